"""Below an adapter's path the engine is asked for that adapter, whatever the body says."""

from __future__ import annotations

import json

import pytest
from gateway_desk import Desk, in_a_loop

from llmux.errors import Reason, Refused
from llmux.gateway.client.body import MAX_PIECES_BYTES, BodyReceiver
from llmux.gateway.http.request import Incoming
from llmux.protocol import ModelInfo

LONG = b'"' + b"x" * MAX_PIECES_BYTES + b'"'
NAMED = [b"alpha", b"alpha-2", b"lora-2", b"else", b"lora", b""]
PART = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


def rewritten(desk: Desk, incoming: Incoming, body: bytes) -> bytes:
    """What alpha's engine gets of a body that comes in pieces."""
    pool = desk.grant()
    receiver = BodyReceiver(desk.worker)
    incoming.body = b""
    receiver.begin(incoming)
    for at in range(0, len(body), 60_000):
        receiver.add(incoming, body[at : at + 60_000])
    receiver.join(incoming)
    _, exchange = desk.asks(incoming)
    assert exchange.model == "alpha"
    ((request, _),) = pool.sent
    sent = b""
    if isinstance(request.body, bytes):
        sent = request.body
    else:
        while piece := request.body.read(len(sent), 1 << 20):
            sent += piece
    assert b"content-length: %d\r\n" % len(sent) in request.head
    return sent


def with_adapters(desk: Desk) -> Desk:
    infos = (
        ModelInfo("alpha", "stopped", aliases=["alpha-2"], adapters=["lora", "lora-2"]),
        ModelInfo("beta", "stopped"),
    )
    desk.catalog(*infos)
    return desk


@pytest.mark.parametrize("rest", [b"1.50", LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    "body",
    [
        *(b'{"x": %%b, "model" : "%b"}' % name for name in NAMED),
        b'{"x": %b}',
        b'{"x": %b,\n"model": null }',
        b'{"model": "alpha", "x": %b, "model": 5}',
        b'{"model": {"model": "alpha"}, "x": %b} ',
        b'{"model": ["lora"], "x": %b}',
    ],
)
@in_a_loop
async def test_an_adapter_in_the_path_is_written_into_the_body(
    body: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = with_adapters(Desk(monkeypatch))
    body = body % rest
    sent = rewritten(desk, desk.incoming(path="/upstream/lora/v1/completions"), body)
    assert json.loads(sent) == json.loads(body) | {"model": "lora"}
    assert rest in sent, "nothing else is written anew"
    if b'"lora"}' in body:
        assert sent == body


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b"{}", b'{"model": "lora"}'),
        (b" { } ", b' { "model": "lora"} '),
        ('{"x": "é"}'.encode("utf-16"), b'{"x": "\\u00e9", "model": "lora"}'),
    ],
)
@in_a_loop
async def test_an_adapter_is_written_into_any_object(
    body: bytes, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = with_adapters(Desk(monkeypatch))
    assert rewritten(desk, desk.incoming(path="/upstream/lora/tokenize"), body) == sent


@pytest.mark.parametrize("parts", [[], [b"file"], [b"model"], [b"file", b"model"]])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("size", [10, 200_000])
@in_a_loop
async def test_an_adapter_in_the_path_is_written_into_a_form(
    parts: list[bytes], name: bytes, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = with_adapters(Desk(monkeypatch))
    values = {b"file": b"x" * size, b"model": name}
    form = b"".join(PART % (part, values[part]) for part in parts) + b"--b--\r\n"
    values[b"model"] = b"lora"
    parts = parts if b"model" in parts else [*parts, b"model"]
    incoming = desk.incoming(
        b"", "Content-Type: multipart/form-data; boundary=b",
        path="/upstream/lora/v1/audio/transcriptions",
    )  # fmt: skip
    sent = rewritten(desk, incoming, form)
    assert sent == b"".join(PART % (part, values[part]) for part in parts) + b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"junk", "not JSON"),
        (b'{"x": 1', "not JSON"),
        (b'{"x": 1' + b" " * 2 * MAX_PIECES_BYTES, "not JSON: the object is not complete"),
        (b"[]", "expected a JSON object"),
        (b"", "not JSON"),
        (PART % (b"file", b"x"), "the form is not complete"),
    ],
)
@in_a_loop
async def test_an_adapter_is_asked_or_nobody(
    body: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = with_adapters(Desk(monkeypatch))
    route = "audio/translations" if body.startswith(b"--") else "completions"
    kind = "Content-Type: multipart/form-data; boundary=b"
    incoming = desk.incoming(b"", kind, path=f"/upstream/lora/v1/{route}")
    with pytest.raises(Refused, match=f"cannot read the request body: .*{said}") as refused:
        rewritten(desk, incoming, body)
    assert refused.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("path", ["/health", "/v1/responses/resp_1"])
@in_a_loop
async def test_below_an_adapter_what_names_no_model_goes_to_its_engine(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = with_adapters(Desk(monkeypatch))
    pool = desk.grant()
    desk.worker.responses.keep({"resp_1": "alpha"}, {})
    desk.asks(desk.incoming(b"", path=f"/upstream/lora{path}", method="GET"))
    assert [request.body for request, _ in pool.sent] == [b""]
