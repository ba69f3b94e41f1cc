"""One connection of a client, byte by byte, without a socket."""

from __future__ import annotations

import pytest
from client_wire import BODY, Door, a_request
from gateway_desk import Desk, in_a_loop

from llmux.gateway.client.body import MAX_CONTROL_BODY, MAX_SKIPPED_BODY
from llmux.gateway.client.connection import (
    FLUSH_SECS,
    KEEP_ALIVE_SECS,
    LINGER_SECS,
    MAX_HEAD,
)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@in_a_loop
async def test_requests_are_answered_one_after_the_other(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    assert door.left == KEEP_ALIVE_SECS
    door.send(a_request(BODY, b"x-a: 1") * 3 + a_request(b"{}"), size)
    for number in range(1, 4):
        assert len(pool.sent) == number
        assert door.left == 0.0
        request = pool.sent[-1][0]
        assert request.body == BODY
        assert b"\r\nx-a: 1\r\n" in request.head
        door.answer()
    assert door.statuses() == [200, 200, 200, 400]
    assert door.connection.exchange is None
    assert door.left == KEEP_ALIVE_SECS
    assert not door.wire.closing
    ids = [line for line in door.got.split(b"\r\n") if line.startswith(b"x-request-id: req-")]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("draining", [True, False])
@pytest.mark.parametrize("header", [b"Connection: close", b"x: y"])
@in_a_loop
async def test_the_connection_ends_when_that_is_said(
    header: bytes, draining: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    closes = draining or header != b"x: y"
    for request, status in (
        (a_request(BODY, header), 200),
        (a_request(b"[]", header), 400),
        (a_request(b"", header, method=b"OPTIONS"), 204),
        (a_request(b"", header, method=b"GET", path=b"/health#x"), 400),
    ):
        door = Door(desk)
        desk.worker.draining = draining
        door.send(request)
        if door.connection.exchange is not None:
            door.answer()
        assert door.statuses() == [status]
        assert (b"connection: close" in door.got) is closes
        assert door.wire.closed is closes
        assert door.left == (FLUSH_SECS if closes else KEEP_ALIVE_SECS)
        desk.worker.draining = False


@in_a_loop
async def test_what_follows_the_last_answer_is_not_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    for rest in (a_request(), a_request()[:30], a_request()[:-3]):
        door = Door(desk)
        before = len(pool.sent)
        door.send(a_request(BODY, b"Connection: close") + rest)
        door.answer()
        door.send(b"more")
        assert (door.statuses(), len(pool.sent)) == ([200], before + 1)
        assert (door.wire.ended, door.wire.closed) in ((True, False), (False, True))
        assert door.left in (LINGER_SECS, FLUSH_SECS)


@in_a_loop
async def test_a_worker_that_hands_over_closes_after_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    door.send(a_request() + a_request())
    desk.worker.closing = True
    door.answer()
    assert door.statuses() == [200], "the second came too late"
    assert door.wire.ended


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"junk\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (a_request(b"", b"Content-Encoding: gzip"), 415),
        (a_request(b"x" * (MAX_SKIPPED_BODY + 1), path=b"/no"), 413),
        (a_request(b"x" * (MAX_CONTROL_BODY + 1), path=b"/control/pin"), 403),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (a_request(b"", path=b"/v1/completions/"), 307),
        (
            a_request(b"", b"Transfer-Encoding: chunked", path=b"/no")
            + b"4001\r\n"
            + b"x" * (MAX_SKIPPED_BODY + 1)
            + b"\r\n0\r\n\r\n",
            413,
        ),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("size", [11, 1 << 20])
@in_a_loop
async def test_what_cannot_be_taken_is_answered_in_its_turn_and_is_the_last(
    data: bytes, status: int, before: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    if before:
        door.send(a_request())
    door.send(data + a_request(), size)
    if before:
        assert door.got == b"", "in its turn"
        door.answer()
    assert door.statuses() == [200, status] if before else [status]
    assert b"connection: close\r\n" in door.got
    assert (door.wire.ended, door.wire.closed, door.left) == (True, False, LINGER_SECS)
    door.send(a_request())
    assert door.connection.exchange is None
    door.connection.expire()
    assert door.wire.closed
    assert desk.worker.bodies.used == 0


@pytest.mark.parametrize("size", [500, 1 << 20])
@pytest.mark.parametrize(("length", "status"), [(MAX_HEAD - 200, 400), (MAX_HEAD + 50, 431)])
@in_a_loop
async def test_a_head_has_a_bound(
    length: int, status: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    door = Door(desk)
    door.send(a_request(b"[]", b"a: " + b"x" * length), size)
    assert door.statuses() == [status]


def a_head(size: int) -> bytes:
    """The bound is on the target, the names, the values and four bytes a header."""
    own = len("/v1/models") + len("Hostx") + 4 + len("a") + 4
    return b"GET /v1/models HTTP/1.1\r\nHost: x\r\na: %b\r\n\r\n" % (b"y" * (size - own))


@pytest.mark.parametrize(
    ("before", "size", "pieces", "taken"),
    [
        (0, MAX_HEAD, 1 << 20, True),
        (0, MAX_HEAD + 1, 1 << 20, False),
        (3, MAX_HEAD * 3 // 5, 1000, True),
        (3, MAX_HEAD * 3 // 5, 1 << 20, True),
    ],
)
@in_a_loop
async def test_each_head_of_a_connection_has_the_whole_bound(
    before: int, size: int, pieces: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    target = b"OPTIONS /v1/models"
    for _ in range(before):
        door.send(a_head(size).replace(b"GET /v1/models", target), pieces)
    door.send(a_head(size).replace(b"GET /v1/models", target), pieces)
    assert door.statuses() == [204] * before + [204 if taken else 431]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (a_request(b"", b"X-Request-Id: mine", b"Content-Encoding: gzip"), 415),
        (a_request(b"{}", b"X-Request-Id: mine"), 400),
        (a_request(BODY * 2000, b"X-Request-Id: mine", path=b"/no"), 413),
        (a_request(b"", b"X-Request-Id: mine", method=b"OPTIONS"), 204),
        (b"junk\r\n\r\n", 400),
    ],
    ids=range(5),
)
@in_a_loop
async def test_what_is_refused_is_named_as_its_client_named_it_and_is_counted(
    data: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    door = Door(desk)
    door.send(data)
    assert door.statuses() == [status]
    assert (b"\r\nx-request-id: mine\r\n" in door.got) is (b"mine" in data)
    assert b"\r\nx-request-id: " in door.got
    counted = dict(desk.worker.observer.requests)
    assert counted == ({} if status == 204 else {("", status): 1})


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), None, False), ((), b"https://a", False), (("https://a",), None, False),
        (("https://a",), b"https://a", True), (("https://a",), b"https://b", False),
        (("*",), None, False), (("*",), b"https://a", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [b"OPTIONS", b"POST"])
@in_a_loop
async def test_an_answer_of_our_own_is_for_the_pages_of_its_origin(
    method: bytes,
    origins: tuple[str, ...],
    origin: bytes | None,
    allowed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    door = Door(Desk(monkeypatch, cors_origins=origins))
    more = [b"Origin: " + origin] if origin else []
    door.send(a_request(b"", *more, method=method))
    refused = 403 if origin and not allowed else 400
    assert door.statuses() == [204 if method == b"OPTIONS" else refused]
    shown = b"*" if origins == ("*",) else b"https://a"
    assert (b"access-control-allow-origin: %b\r\n" % shown in door.got) is allowed
    assert (b"access-control" in door.got) is allowed


@in_a_loop
async def test_nothing_is_kept_of_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, max_body_bytes=MAX_CONTROL_BODY)
    door = Door(desk)
    head = a_request(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    door.send(head + b"4\r\nabcd\r\n" * 3 + b"zz\r\n")
    assert door.statuses() == [400]
    assert (door.connection._body.pieces, desk.worker.bodies.used) == ([], 0)
    other = Door(desk)
    other.send(a_request() + head + b"4\r\nabcd\r\n" * 3 + b"zz\r\n")
    assert (other.statuses(), desk.worker.bodies.used) == ([], len(BODY)), "in its turn"
    door.send(b"more")
    assert door.wire.reading_paused, "what is discarded is read in turns, too"
    await door.settle()
    assert not door.wire.reading_paused


@in_a_loop
async def test_a_head_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(Desk(monkeypatch))
    door.send(b"POST / HTTP/1.1\r\nHost: x\r\na: ")
    door.send(b"x" * MAX_HEAD, 1000)
    assert door.statuses() == []
    door.send(b"x")
    assert door.statuses() == [431]


@in_a_loop
async def test_who_waits_for_a_100_gets_it_unless_another_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    request = a_request(BODY, b"Expect: 100-continue")
    door = Door(desk)
    door.send(request[: -len(BODY)])
    assert door.got == b"HTTP/1.1 100 Continue\r\n\r\n"
    door.send(BODY)
    door.answer()
    assert door.statuses() == [100, 200]
    door.send(a_request() + request[: -len(BODY)])
    door.answer()
    assert door.statuses() == [100, 200, 200]
    door.send(BODY)
    door.answer()
    assert door.statuses() == [100, 200, 200, 200]


@pytest.mark.parametrize("size", [1, 40, 1 << 20])
@in_a_loop
async def test_a_body_in_chunks_is_one_and_its_trailers_are_dropped(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    chunks = (
        b"5\r\n"
        + BODY[:5]
        + b"\r\n%x\r\n" % len(BODY[5:])
        + BODY[5:]
        + b"\r\n0\r\nx-late: 1\r\n\r\n"
    )
    door.send(a_request(chunks, b"Transfer-Encoding: chunked") + a_request(), size)
    for number in (1, 2):
        assert len(pool.sent) == number
        request = pool.sent[-1][0]
        assert (request.body, b"x-late" in request.head) == (BODY, False)
        assert b"content-length: %d\r\n" % len(BODY) in request.head
        door.answer()


@pytest.mark.parametrize("size", [1, 1 << 20])
@in_a_loop
async def test_a_wish_to_upgrade_is_dropped_and_connect_ends_it(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    upgrade = a_request(BODY, b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings")
    door.send(upgrade + upgrade, size)
    for number in (1, 2):
        assert [one.body for one, _ in pool.sent] == [BODY] * number
        assert b"pgrade" not in pool.sent[-1][0].head
        door.answer()
    door.send(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\nnot HTTP")
    await door.settle()
    assert len(door.statuses()) == 3
    assert door.wire.ended
    last = door.got.rpartition(b"HTTP/1.1 ")[2]
    assert b"\r\nconnection: close\r\n" in last.lower()


@in_a_loop
async def test_the_body_of_one_that_wished_to_upgrade_is_read_as_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    headers = (b"Upgrade: h2c", b"Connection: Upgrade", b"Transfer-Encoding: chunked")
    door.send(a_request(b"zz\r\nno chunk\r\n0\r\n\r\n", *headers) + a_request())
    await door.settle()
    assert door.statuses() == [400]
    assert (b"cannot read the request: " in door.got, pool.sent, door.wire.ended) == (
        True, [], True,
    )  # fmt: skip


@in_a_loop
async def test_of_a_connection_that_closes_nothing_more_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    door.send(a_request())
    door.wire.closing = True
    door.answer()
    assert (door.left, door.wire.ended, door.wire.closed) == (0.0, False, False)
    other = Door(desk)
    other.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    await other.settle()
    info = other.connection.conn_info
    assert info is not None and not info.lost
    other.connection.connection_lost(None)
    assert info.lost
