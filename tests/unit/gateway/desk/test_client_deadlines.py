"""A client's connection: its deadlines, its end, its pace; without a socket."""

from __future__ import annotations

import json

import pytest
from client_wire import BODY, Door, a_request
from gateway_desk import Desk, in_a_loop

from llmux.gateway.client import connection as connection_module
from llmux.gateway.client.body import MAX_PIECES_BYTES
from llmux.gateway.client.connection import (
    FIRST_SECS,
    FLUSH_SECS,
    LINGER_SECS,
    RECEIVE_RATE,
    RECEIVE_SECS,
)

# ---- time ----------------------------------------------------------------------------------------


@in_a_loop
async def test_a_deadline_that_passes_ends_what_it_was_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    idle = Door(desk)
    idle.connection.expire()
    assert (idle.wire.closed, idle.wire.aborted, idle.left) == (True, False, FLUSH_SECS)
    idle.connection.expire()
    assert idle.left == 0.0, "it closes already"
    assert idle.wire.aborted, "and what it has to flush is not read"
    late = Door(desk)
    late.send(a_request()[:-1])
    assert late.left == RECEIVE_SECS
    desk.now += RECEIVE_SECS
    late.connection.expire()
    assert late.statuses() == [408]
    assert (late.left, late.wire.closed) == (LINGER_SECS, False)
    late.connection.expire()
    assert late.wire.closed
    busy = Door(desk)
    busy.send(a_request())
    busy.connection.deadline = desk.now
    busy.connection.expire()
    assert (busy.left, busy.wire.closed, busy.got) == (0.0, False, b""), "no stream: no sign"
    desk.worker.draining = True
    assert Door(desk).left == FIRST_SECS


@in_a_loop
async def test_a_stream_is_told_that_it_waits_when_its_deadline_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, keep_alive_comment_secs=7.0)
    door = Door(desk)
    door.send(a_request(json.dumps({"model": "alpha", "stream": True}).encode()))
    assert door.left == 7.0
    desk.now += 7.0
    door.connection.expire()
    assert door.left == 7.0
    assert door.got.endswith(b": waiting for alpha\n\n\r\n")


@in_a_loop
async def test_a_long_body_keeps_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    door = Door(desk)
    enough = int(RECEIVE_RATE * RECEIVE_SECS)
    door.send(a_request(b"x" * (4 * enough))[: -4 * enough] + b'{"x":"')
    door.connection._window = door.connection._body.size
    began = desk.now
    desk.now += 10.0
    door.send(b"x" * (enough - 1))
    assert door.connection.deadline == began + RECEIVE_SECS
    desk.now += 10.0
    door.send(b"x")
    assert door.left == RECEIVE_SECS, "another window"
    desk.now += 10.0
    door.send(b"x" * (enough - 1))
    assert door.left == RECEIVE_SECS - 10.0


# ---- the end -------------------------------------------------------------------------------------


@in_a_loop
async def test_connections_are_counted_and_those_too_many_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, max_connections=2)
    doors = [Door(desk) for _ in range(3)]
    assert desk.worker.clients == 3
    assert desk.worker.client_came.is_set()
    assert [door.statuses() for door in doors] == [[], [], [503]]
    assert b"retry-after: 1\r\n" in doors[2].got
    assert (
        b"cannot accept the connection: 2 are open (try again later; the limit is"
        b" gateway.max_connections)"
    ) in doors[2].got
    assert (doors[2].left, doors[2].wire.ended) == (LINGER_SECS, True)
    assert not desk.worker.client_left.is_set()
    doors[2].connection.connection_lost(None)
    assert (desk.worker.clients, desk.worker.client_left.is_set()) == (2, True)
    assert doors[2].left == 0.0


@in_a_loop
async def test_what_a_slow_client_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each connection: uvloop's own bound is the same, asyncio's is not."""
    assert Door(Desk(monkeypatch)).wire.limits == {"low": 16 << 10, "high": 64 << 10}


@in_a_loop
async def test_a_client_that_leaves_takes_its_requests_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    door = Door(desk)
    door.send(a_request() + a_request() + a_request()[:-1])
    assert desk.worker.admission.demand("alpha").waiting == 1
    assert desk.worker.bodies.used > 0
    door.connection.connection_lost(None)
    assert desk.worker.admission.demand("alpha").waiting == 0
    assert desk.worker.observer.abandoned == {"alpha": 1}
    assert desk.worker.bodies.used == 0
    assert door.got == b""
    half = Door(desk)
    for piece in (a_request()[:-8], b"abc", b"def"):
        half.send(piece)
    half.connection.connection_lost(None)
    assert half.connection._body.pieces == [], "Sanic may keep the connection"
    assert desk.worker.bodies.used == 0


@in_a_loop
async def test_the_engine_waits_while_the_client_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    door.connection.pause_writing()
    door.connection.resume_writing()
    door.send(a_request())
    exchange = door.connection.exchange
    assert exchange is not None
    calls = exchange.connection.calls  # type: ignore[union-attr]
    door.connection.pause_writing()
    assert (calls, door.connection.writing_paused) == (["pause"], True)
    door.connection.resume_writing()
    assert (calls, door.connection.writing_paused) == (["pause", "resume"], False)


@in_a_loop
async def test_what_is_idle_ends_with_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.grant()
    new, idle, busy, begun = (Door(desk) for _ in range(4))
    for door in (idle, busy):
        door.send(a_request())
    idle.answer()
    begun.send(a_request()[:20])
    assert [one.connection.close_if_idle() for one in (new, idle, busy, begun)] == [
        False, True, False, False,
    ]  # fmt: skip
    assert [one.wire.closed for one in (new, idle, busy, begun)] == [False, True, False, False]
    assert [one.left for one in (new, idle, busy, begun)] == [
        FIRST_SECS, FLUSH_SECS, 0.0, RECEIVE_SECS,
    ]  # fmt: skip


@in_a_loop
async def test_a_long_pipeline_is_read_as_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_QUEUED", 2)
    desk = Desk(monkeypatch)
    desk.grant()
    door = Door(desk)
    door.send(a_request() * 3)
    assert [door.wire.reading_paused] == [False], "one is answered, two wait"
    door.send(a_request())
    assert [door.wire.reading_paused] == [True]
    for _ in range(3):
        door.answer()
        assert [door.wire.reading_paused] == [True]
    door.answer()
    assert [door.wire.reading_paused] == [False]
    monkeypatch.setattr(connection_module, "MAX_QUEUED_BYTES", len(BODY))
    door.send(a_request() * 2)
    assert [door.wire.reading_paused] == [False]
    door.send(a_request())
    assert [door.wire.reading_paused] == [True]
    door.connection.stop_reading()
    assert [door.wire.reading_paused] == [False], "EOF is seen"
    for _ in range(3):
        door.answer()
    assert door.wire.ended


@in_a_loop
async def test_a_long_body_is_received_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    pool = desk.grant()
    door = Door(desk)
    body = json.dumps({"x": "y" * MAX_PIECES_BYTES, "model": "alpha"}).encode()
    data = a_request(body)
    door.send(data[:1000])
    assert [door.wire.reading_paused] == [False]
    door.send(data[1000:-1])
    assert [door.wire.reading_paused] == [True]
    await door.settle()
    assert [door.wire.reading_paused] == [False]
    door.send(data[-1:])
    request = pool.sent[-1][0]
    assert not isinstance(request.body, bytes)
    assert request.body.read(0, len(body) + 1) == body
