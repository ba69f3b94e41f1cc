"""Requests that Sanic answers, between others: in their turn, closed when they are the last."""

from __future__ import annotations

import json

import pytest
from client_wire import BODY, Door, Handing, a_request
from gateway_desk import Desk, in_a_loop

from llmux.config.keyfile import hash_key
from llmux.config.schema import Key, KeyRole
from llmux.gateway.client.connection import KEEP_ALIVE_SECS, LINGER_SECS

OURS = a_request(b"", b"Origin: https://a", path=b"/health", method=b"GET")


def handing(desk: Desk) -> tuple[Door, Handing]:
    door = Door(desk, Handing)
    assert isinstance(door.connection, Handing)
    return door, door.connection


@pytest.mark.parametrize("draining", [True, False])
@in_a_loop
async def test_each_is_answered_before_the_next_is_begun(
    draining: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door, connection = handing(desk)
    desk.worker.draining = draining
    door.send(a_request() + OURS + a_request() + OURS)
    assert (connection.handed, door.statuses()) == ([], [])
    if draining:
        door.answer()
        assert (connection.handed, door.statuses()) == ([], [200]), "its answer said close"
        return
    door.answer()
    ((request, key, origin),) = connection.handed
    assert request.startswith(b"GET /health HTTP/1.1\r\nHost: x\r\n")
    assert request.endswith(b"connection: keep-alive\r\n\r\n")
    assert (key, origin, connection.exchange) == (None, b"https://a", None)
    assert not connection.close_if_idle(), "it is answering"
    assert door.left == 0.0
    connection.sanic_done()
    assert connection.exchange is not None
    door.answer()
    assert len(connection.handed) == 2
    assert door.left == 0.0
    connection.sanic_done()
    assert (door.left, door.wire.closing) == (KEEP_ALIVE_SECS, False)
    assert connection.close_if_idle()


@pytest.mark.parametrize("draining", [True, False])
@pytest.mark.parametrize("junk", [True, False])
@in_a_loop
async def test_the_last_one_says_that_it_is(
    draining: bool, junk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(monkeypatch)
    door, connection = handing(desk)
    desk.worker.draining = draining
    door.send(OURS + b"junk\r\n\r\n" if junk else OURS)
    ((request, _, _),) = connection.handed
    assert request.endswith(b"connection: close\r\n\r\n") is draining
    connection.sanic_done()
    if draining:
        assert door.statuses() == [], "its answer said close"
    else:
        assert door.statuses() == [400] * junk
    assert door.wire.closing is (draining and not junk)
    assert door.wire.ended is junk
    assert door.left == (LINGER_SECS if junk else door.left)


@in_a_loop
async def test_a_page_is_not_ended_before_all_that_was_asked_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    door.send(a_request() * 2 + b"POST /x HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n")
    door.answer()
    assert (door.statuses(), door.wire.ended, door.left) == ([200], False, 0.0)
    door.answer()
    assert (door.statuses(), door.wire.ended, door.left) == ([200, 200, 400], True, LINGER_SECS)
    told = json.loads(door.got.rpartition(b"\r\n\r\n")[2])["error"]["message"]
    assert told == "the host is missing or given more than once"


@in_a_loop
async def test_what_is_half_received_when_its_connection_ends_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    door.send(a_request() + a_request()[:-1])
    desk.worker.closing = True
    door.answer()
    assert (door.statuses(), door.wire.ended, door.wire.closed) == ([200], True, False)
    assert door.left == LINGER_SECS
    door.send(a_request()[-1:])
    assert (len(pool.sent), door.statuses()) == (1, [200])


@in_a_loop
async def test_http_1_0_may_come_without_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    door, connection = handing(Desk(monkeypatch))
    door.send(b"GET /health HTTP/1.0\r\n\r\n")
    ((request, _, _),) = connection.handed
    assert request.startswith(b"GET /health HTTP/1.0\r\n")
    assert request.endswith(b"connection: close\r\n\r\n")


ASKS = b"Access-Control-Request-Method: POST"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((), []),
        ((ASKS,), ["methods: POST, OPTIONS", "max-age: 7200"]),
        ((ASKS, b"Access-Control-Request-Headers: a, X-b"),
         ["methods: POST, OPTIONS", "max-age: 7200", "headers: a, X-b"]),
        ((ASKS, b"Access-Control-Request-Headers: a;b"),
         ["methods: POST, OPTIONS", "max-age: 7200"]),
        ((b"Access-Control-Request-Headers: a",), []),
    ],
)  # fmt: skip
@in_a_loop
async def test_a_preflight_is_told_what_it_asks(
    headers: tuple[bytes, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(Desk(monkeypatch, cors_origins=("https://a",)))
    door.send(a_request(b"", b"Origin: https://a", *headers, method=b"OPTIONS"))
    lines = door.got.decode().split("\r\n")
    assert lines[:2] == ["HTTP/1.1 204 No Content", "allow: POST, OPTIONS"]
    found = [line.replace("-allow", "") for line in lines if line.startswith("access-control")]
    own = [line.removeprefix("access-control-") for line in found]
    assert own[: len(expected)] == expected
    assert own[len(expected)] == "origin: https://a"
    assert [line for line in own if line.startswith(("methods", "max-age", "headers"))] == expected


@pytest.mark.parametrize("origin", [(), (b"Origin: https://b",)])
@in_a_loop
async def test_a_preflight_of_another_page_is_told_nothing(
    origin: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(Desk(monkeypatch, cors_origins=("https://a",)))
    door.send(a_request(b"", *origin, ASKS, method=b"OPTIONS"))
    assert door.statuses() == [204]
    assert b"access-control" not in door.got


@in_a_loop
async def test_who_asks_is_handed_on_and_a_100_waits_for_the_answer_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin = Key("one", hash_key("1"), KeyRole.ADMIN)
    desk = Desk(monkeypatch, keys=lambda: (admin,))
    door, connection = handing(desk)
    named = (b"Authorization: Bearer 1",)
    door.send(a_request(b"{}", *named, path=b"/control/pin"))
    ((request, use, origin),) = connection.handed
    assert (request[-2:], origin) == (b"{}", b"")
    assert use is not None
    assert use.key == admin
    door.send(a_request(BODY, *named, b"Expect: 100-continue")[: -len(BODY)])
    assert door.got == b"", "it would stand inside the answer"
