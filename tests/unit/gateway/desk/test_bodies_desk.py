"""Bodies: their bounds, where they are kept, and what of them is told when that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from client_wire import Door, a_request
from gateway_desk import Desk, in_a_loop

from llmux.errors import Reason, Refused
from llmux.gateway.client.body import (
    MAX_CONTROL_BODY,
    MAX_PIECES_BYTES,
    MAX_SKIPPED_BODY,
    BodyReceiver,
)
from llmux.gateway.http.budget import SHORT_BODY, BodyBudget
from llmux.gateway.http.multipart import MEMORY_BYTES, SPOOL_DIR, Upload
from llmux.gateway.http.openai import read_body, replace_model
from llmux.gateway.http.request import Incoming

FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nalpha\r\n--b--\r\n'
FORM_TYPE = "Content-Type: multipart/form-data; boundary=b"
MIB = 1 << 20


def received(desk: Desk, incoming: Incoming, *pieces: bytes) -> Incoming:
    receiver = BodyReceiver(desk.worker)
    receiver.begin(incoming)
    for piece in pieces:
        receiver.add(incoming, piece)
    if receiver.pieces:
        receiver.join(incoming)
    assert receiver.size == sum(map(len, pieces))
    return incoming


@pytest.mark.parametrize(
    ("method", "path", "most", "kept"),
    [
        ("GET", "/control/status", MAX_SKIPPED_BODY, False),
        ("POST", "/nowhere", MAX_SKIPPED_BODY, False),
        ("POST", "/health", MAX_SKIPPED_BODY, False),
        ("OPTIONS", "/v1/completions", MAX_SKIPPED_BODY, False),
        ("POST", "/control/pin", MAX_CONTROL_BODY, True),
        ("POST", "/unload", MAX_CONTROL_BODY, True),
        ("GET", "/v1/responses/resp_1", MAX_CONTROL_BODY, True),
        ("POST", "/v1/responses/resp_1/cancel", MAX_CONTROL_BODY, True),
        ("POST", "/v1/completions", 2 * MIB, True),
    ],
)
@in_a_loop
async def test_each_kind_of_body_has_its_bound(
    method: str, path: str, most: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch, max_body_bytes=2 * MIB)
    whole = b"{" + b" " * (most - 1)
    incoming = desk.incoming(b"", path=path, method=method)
    incoming.length = most
    received(desk, incoming, whole[:-5], whole[-5:])
    inference = path == "/v1/completions" and method == "POST"
    later = incoming.match is not None
    assert (incoming.upload is not None) is (later and most > MAX_PIECES_BYTES)
    assert desk.worker.bodies.used == (most if kept else 0)
    if not later:
        assert incoming.body == (whole if kept else b"")
    assert inference <= later
    for length, pieces in ((most + 1, ()), (0, (whole, b" "))):
        incoming = desk.incoming(b"", path=path, method=method)
        incoming.length = length
        with pytest.raises(Refused, match=f"larger than {most} bytes") as refused:
            received(desk, incoming, *pieces)
        assert refused.value.reason is Reason.BODY_TOO_LARGE


@pytest.mark.parametrize("size", [MAX_PIECES_BYTES, MAX_PIECES_BYTES + 1])
@in_a_loop
async def test_a_long_body_for_an_engine_is_read_in_passing(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    whole = b'{"model":"alpha","stream":true,"x":"'
    whole += b"y" * (size - len(whole) - 2) + b'"}'
    incoming = received(desk, desk.incoming(b""), whole[:10], whole[10:99], whole[99:])
    assert (incoming.upload is None) is (size == MAX_PIECES_BYTES)
    assert incoming.json() == ("alpha", True, None)
    assert (incoming.body or (incoming.upload and incoming.upload.read(0, size))) == whole
    assert b"content-length: %d\r\n" % size in incoming.engine_head()


@in_a_loop
async def test_a_form_for_an_unknown_model_is_refused_before_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    path = "/v1/audio/transcriptions"
    form = FORM.replace(b"alpha", b"else").removesuffix(b"--\r\n") + b"\r\n"
    with pytest.raises(Refused, match='the model "else" does not exist'):
        received(desk, desk.incoming(b"", FORM_TYPE, path=path), form)
    incoming = received(desk, desk.incoming(b"", FORM_TYPE, path=path), FORM[:50], FORM[50:])
    assert incoming.model() == "alpha"
    path = f"/upstream/else{path}"
    with pytest.raises(Refused, match='the model "else" does not exist'):
        received(desk, desk.incoming(b"", FORM_TYPE, path=path), FORM[:9])
    desk = Desk(monkeypatch, fallback_model="alpha")
    received(desk, desk.incoming(b"", FORM_TYPE, path="/v1/audio/transcriptions"), form)


@pytest.mark.parametrize("form", [True, False])
@in_a_loop
async def test_a_full_disk_is_no_fault_of_the_client(
    form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    path = "/v1/audio/transcriptions" if form else "/v1/completions"
    incoming = desk.incoming(b"", FORM_TYPE, path=path)

    def full(_upload: Upload, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Upload, "write", full)
    with pytest.raises(Refused) as refused:
        received(desk, incoming, b"{" * (MAX_PIECES_BYTES + 1))
    assert refused.value.reason is Reason.INTERNAL
    assert str(refused.value) == "cannot store the upload: No space left on device"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", b"[" * (MAX_PIECES_BYTES + 1), "not JSON: expected a JSON object"),
        ("/v1/audio/transcriptions", FORM[:-7] + FORM, 'the form has more than one "model"'),
    ],
)
@in_a_loop
async def test_what_cannot_be_read_in_passing_is_refused(
    path: str, body: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    with pytest.raises(Refused, match="cannot read the request body") as refused:
        received(desk, desk.incoming(b"", FORM_TYPE, path=path), body)
    assert said in str(refused.value)
    assert refused.value.reason is Reason.BAD_REQUEST


def test_the_budget_leaves_an_eighth_to_short_bodies() -> None:
    budget = BodyBudget(MIB)
    eighth = MIB // 8
    for used, size, more, room in (
        (0, 0, MIB - eighth, True),
        (0, 0, MIB - eighth + 1, False),
        (MIB - eighth, 0, SHORT_BODY, True),
        (MIB - eighth, 1, SHORT_BODY, False),
        (MIB - SHORT_BODY, 0, SHORT_BODY, True),
        (MIB - SHORT_BODY + 1, 0, SHORT_BODY, False),
    ):
        budget.used = used
        assert budget.has_room(size, more) is room, (used, size, more)
    problem = budget.exceeded()
    assert (problem.reason, problem.retry_after) == (Reason.QUEUE_FULL, 1.0)


@in_a_loop
async def test_a_full_budget_refuses_what_it_would_hold_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, max_buffered_bytes=MIB)
    desk.worker.bodies.used = MIB
    for path, refused in (("/v1/completions", True), ("/control/pin", True), ("/nowhere", False)):
        incoming = desk.incoming(b"", path=path)
        incoming.length = 1
        if refused:
            with pytest.raises(Refused, match="bytes of other requests are held"):
                received(desk, incoming, b"x")
            incoming.length = 0
            with pytest.raises(Refused, match="bytes of other requests are held"):
                received(desk, incoming, b"x")
        else:
            received(desk, incoming, b"x")
        assert desk.worker.bodies.used == MIB


@in_a_loop
async def test_the_eighth_of_the_budget_is_for_bodies_that_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are told as soon as their length is known."""
    desk = Desk(monkeypatch, max_buffered_bytes=4 * MIB)
    budget = desk.worker.bodies
    for used, length, fits in (
        (budget.long_limit, SHORT_BODY, True),
        (budget.long_limit, SHORT_BODY + 1, False),
        (budget.long_limit - SHORT_BODY - 1, SHORT_BODY + 1, True),
        (budget.long_limit - SHORT_BODY, SHORT_BODY + 1, False),
        (4 * MIB - SHORT_BODY, SHORT_BODY, True),
        (4 * MIB - SHORT_BODY + 1, SHORT_BODY, False),
        (4 * MIB, 0, True),
    ):
        budget.used = used
        incoming = desk.incoming(b"")
        incoming.length = length
        if fits:
            received(desk, incoming, *([b"{" + b" " * (length - 1)] if length else []))
            assert budget.used == used + length
        else:
            with pytest.raises(Refused, match=f"{used} bytes of other requests are held"):
                received(desk, incoming)
        del incoming


@pytest.mark.parametrize("size", [MEMORY_BYTES, MEMORY_BYTES + 1])
def test_an_upload_is_the_same_in_memory_and_on_disk(size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    for start, end, new in ((0, 0, b""), (5, 10, b"longer than that"), (size - 3, size, b"")):
        upload = Upload()
        for at in range(0, size, 100_000):
            upload.write(data[at : min(at + 100_000, size)])
        assert (upload._fd is None) is (size == MEMORY_BYTES)
        upload.replace(start, end, new)
        whole = b""
        while piece := upload.read(len(whole), 70_000):
            whole += piece
        assert whole == data[:start] + new + data[end:size]
        assert upload.size == len(whole)


@pytest.mark.parametrize("named", [None, "", "there"])
def test_a_long_upload_is_where_it_may_be_and_has_no_name(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named is None:
        monkeypatch.delenv("TMPDIR", raising=False)
    else:
        monkeypatch.setenv("TMPDIR", named and str(tmp_path))
    upload = Upload()
    upload.write(b"x" * MEMORY_BYTES)
    upload.write(b"y")
    assert not upload._memory, "it is on the disk"
    path = Path(f"/proc/self/fd/{upload._fd}")
    assert os.stat(path).st_nlink == 0
    assert os.readlink(path).startswith(f"{tmp_path if named else SPOOL_DIR}/llmux-upload-")
    assert (os.stat(path).st_size, upload.size) == (MEMORY_BYTES + 1, MEMORY_BYTES + 1)
    where = os.readlink(path)
    del upload
    assert not path.is_symlink() or os.readlink(path) != where


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', ("a", False, None)),
        (b' {"model":"a","stream":true} \r\n', ("a", True, None)),
        (b'{"model":"a","stream":0}', ("a", False, None)),
        (b'{"model":"a","model":"b"}', ("b", False, None)),
        (b'{"model":"a","previous_response_id":"r"}', ("a", False, "r")),
        (b'{"model":"a","previous_response_id":7}', ("a", False, None)),
        ('{"model":"a"}'.encode("utf-16"), ("a", False, None)),
        (b'{"model":"a"}x', "not JSON: Extra data"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"x":' * 100_000, "not JSON"),
        (b"[]", "expected a JSON object with a model"),
        (b"{}", '"model" is missing'),
        (b'{"model":null}', '"model" is missing'),
        (b'{"model":7}', '"model" is not a string'),
        (b'{"model":""}', '"model" is empty'),
    ],
    ids=range(18),
)
def test_what_is_read_of_a_short_body(body: bytes, expected: Any) -> None:
    if not isinstance(expected, str):
        assert read_body(body) == expected
        return
    with pytest.raises(Refused) as refused:
        read_body(body)
    assert expected in str(refused.value)
    assert refused.value.reason is Reason.BAD_REQUEST
    assert refused.value.fields.get("param") == ("model" if '"model"' in expected else None)


def test_a_name_is_replaced_and_nothing_else() -> None:
    body = b'{ "x": {"model": "a"}, "model" : "a" , "y": 1}'
    assert replace_model(body, 'b"') == b'{ "x": {"model": "a"}, "model" : "b\\"" , "y": 1}'
    assert read_body(replace_model('{"model":"a","x":1}'.encode("utf-16"), "b"))[0] == "b"


@in_a_loop
async def test_each_body_of_a_connection_is_received_as_if_it_were_its_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    receiver = BodyReceiver(desk.worker)
    assert receiver.size == 0
    for method, path, body, kept in (
        ("GET", "/health", b"x" * 10, b""),
        ("POST", "/v1/completions", b"{}", b"{}"),
        ("POST", "/nowhere", b"x" * 10, b""),
        ("POST", "/control/pin", b"{" + b" " * 50, b"{" + b" " * 50),
        ("POST", "/v1/completions", b"{" + b" " * (MAX_CONTROL_BODY + 1), b""),
        ("GET", "/v1/responses/r", b"{}", b"{}"),
    ):
        incoming = desk.incoming(b"", path=path, method=method)
        receiver.begin(incoming)
        receiver.add(incoming, body)
        assert (incoming.body, receiver.size) == (kept, len(body))
        assert (incoming.upload is not None) is (len(body) > MAX_CONTROL_BODY)


@pytest.mark.parametrize("size", [10, MAX_PIECES_BYTES + 1])
@in_a_loop
async def test_a_body_that_is_dropped_is_held_no_longer(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    incoming = received(desk, desk.incoming(b""), b"{" + b" " * (size - 1))
    assert desk.worker.bodies.used == size
    for _ in range(2):
        incoming.drop_body()
        assert (incoming.body, incoming.upload, desk.worker.bodies.used) == (b"", None, 0)


@in_a_loop
async def test_after_a_client_has_gone_nothing_of_it_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    door.send(a_request() * 3)
    door.wire.closing = True
    door.answer()
    assert len(pool.sent) == 1
