"""The pool of connections to an engine: which are used again and which are closed."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from engine_wire import ASKED, CLOSED, SHORT, Heard, Line

from llmux.gateway.engine import pool as pool_module
from llmux.gateway.engine.connection import EngineConnection
from llmux.gateway.engine.pool import EnginePool
from llmux.gateway.engine.request import Delivery, EngineRequest
from llmux.gateway.engine.rewriting import UnchunkingConnection
from llmux.protocol import Address


class Basin:
    """A pool whose connections are made here."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.empty = 0
        self.pool = EnginePool(Address(port=1), self._on_empty)
        self.lines: list[Line] = []
        self.error = error
        setattr(self.pool, "_open_connection", self._open)  # noqa: B010  # of a method

    def _on_empty(self) -> None:
        self.empty += 1

    async def _open(self, kind: type[EngineConnection]) -> EngineConnection:
        if self.error is not None:
            raise self.error
        line = Line(kind, owners=self.pool)  # type: ignore[arg-type]
        self.lines.append(line)
        return line.connection

    async def send(self, request: EngineRequest = ASKED, *, wants: bool = True) -> Heard:
        sink = Heard(wants=wants)
        self.pool.send(request, sink)
        while self.pool._connecting:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
        return sink


def test_connections_are_used_again_each_by_its_kind() -> None:
    async def run() -> None:
        basin = Basin()
        first, second = await basin.send(), await basin.send()
        plain = EngineRequest(b"h", b"", Delivery.UNCHUNKED)
        third = await basin.send(plain)
        assert [type(line.connection) for line in basin.lines] == [
            EngineConnection, EngineConnection, UnchunkingConnection,
        ]  # fmt: skip
        for line in basin.lines:
            line.hear(SHORT)
        assert [one.ended for one in (first, second, third)] == [1, 1, 1]
        again = [await basin.send(), await basin.send(plain), await basin.send()]
        assert [one.connection for one in again] == [
            basin.lines[number].connection for number in (1, 2, 0)
        ]
        assert len(basin.lines) == 3
        basin.lines[0].hear(SHORT)
        basin.lines[0].wire.closing = True
        fresh = await basin.send()
        assert fresh.connection is basin.lines[3].connection, "the idle one closes"

    asyncio.run(run())


def test_what_cannot_be_used_again_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_IDLE", 2)

    async def run() -> None:
        basin = Basin()
        for _ in range(4):
            await basin.send()
        basin.lines[0].connection.pause()
        for line in basin.lines[:3]:
            line.hear(SHORT)
        basin.lines[3].hear(CLOSED)
        assert [line.wire.closing for line in basin.lines] == [False, False, True, True]
        assert not basin.lines[0].wire.reading_paused
        assert not basin.pool.empty
        basin.lines[1].connection.connection_lost(None)  # while idle
        assert (await basin.send()).connection is basin.lines[0].connection
        await basin.send()
        assert len(basin.lines) == 5, "the lost one is not in the pool any more"

    asyncio.run(run())


def test_one_that_closes_takes_no_place_of_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_IDLE", 1)

    async def run() -> None:
        basin = Basin()
        await basin.send()
        await basin.send()
        dying, well = basin.lines
        dying.wire.closing = True
        for line in (dying, well):
            line.hear(SHORT)
        assert not well.wire.closing
        assert (await basin.send()).connection is well.connection

    asyncio.run(run())


def test_a_closed_pool_is_empty_with_its_last_connection() -> None:
    async def run() -> None:
        basin = Basin()
        await basin.send()
        await basin.send()
        idle, used = basin.lines
        idle.hear(SHORT)
        assert basin.empty == 0
        basin.pool.close()
        assert (idle.wire.closing, used.wire.closing, basin.empty) == (True, False, 0)
        idle.connection.connection_lost(None)
        used.hear(SHORT)
        assert (used.wire.closing, basin.empty) == (True, 0)
        used.connection.connection_lost(None)
        assert basin.empty == 1
        basin.pool.reopen()
        await basin.send()
        basin.lines[2].hear(SHORT)
        assert not basin.lines[2].wire.closing
        basin.lines[2].connection.connection_lost(None)
        assert basin.empty == 1, "it is open"
        basin.pool.close()
        assert basin.empty == 2

    asyncio.run(run())


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(111, "Connection refused"), "cannot connect to the engine at 1: Connection"),
        (OSError("odd"), "cannot connect to the engine at 1: odd"),
        (TimeoutError(), "the engine at 1 does not accept connections"),
    ],
    ids=["refused", "odd", "slow"],
)
def test_an_engine_that_takes_no_connection_is_told_to_who_still_wants_it(
    error: Exception, said: str, lost: bool
) -> None:
    async def run() -> None:
        basin = Basin(error=error)
        for wants in (True, False):
            sink = Heard(wants=wants)
            basin.pool.send_fresh(ASKED, sink, lost=lost)
            while basin.pool._connecting:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0)
            expected = said.replace("at 1", f"at {basin.pool.address}")
            assert [(one.error.startswith(expected), one.connected) for one in sink.failures] == [
                (True, lost)
            ] * wants
        assert basin.pool.empty

    asyncio.run(run())


def test_a_connection_that_nobody_wants_any_more_is_kept_and_a_dead_one_is_not_used() -> None:
    async def run() -> None:
        basin = Basin()
        sink = await basin.send(wants=False)
        assert (sink.connection, basin.lines[0].wire.written) == (None, [])
        assert (await basin.send()).connection is basin.lines[0].connection

        async def dead(kind: type[EngineConnection]) -> EngineConnection:
            connection = kind(basin.pool)
            connection.transport = SimpleNamespace(is_closing=lambda: True)
            return connection

        setattr(basin.pool, "_open_connection", dead)  # noqa: B010  # of a method
        sink = await basin.send()
        assert [(one.error, one.connected) for one in sink.failures] == [
            ("the engine closed the connection at once", True)
        ]

    asyncio.run(run())


@pytest.mark.parametrize("error", [None, OSError("gone")])
def test_a_pool_that_is_closed_as_it_connects_is_empty_after_that(error: Exception | None) -> None:
    async def run() -> None:
        basin = Basin(error=error)
        sink = Heard(wants=False)
        basin.pool.send(ASKED, sink)
        assert not basin.pool.empty
        basin.pool.close()
        assert basin.empty == 0
        while basin.pool._connecting:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
        if error is None:
            (line,) = basin.lines
            assert (line.wire.closing, basin.empty, line.wire.written) == (True, 0, [])
            line.connection.connection_lost(None)
        assert basin.empty == 1
        assert sink.failures == []

    asyncio.run(run())


@pytest.mark.parametrize("error", [TimeoutError(), OSError("gone")])
def test_one_that_refuses_ends_the_attempt_and_nothing_fails_of_itself(error: Exception) -> None:
    faults: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, what: faults.append(what))
        sink = await Basin(error=error).send()
        assert len(sink.failures) == 1
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(run())
    assert faults == []


@pytest.mark.parametrize(("answer", "kept"), [(SHORT, True), (CLOSED, False)])
def test_one_that_the_engine_will_close_is_closed_though_there_is_room(
    answer: bytes, kept: bool
) -> None:
    async def run() -> None:
        basin = Basin()
        sink = await basin.send()
        (line,) = basin.lines
        line.hear(answer)
        assert (sink.ended, line.wire.closing) == (1, not kept)
        await basin.send()
        assert len(basin.lines) == (1 if kept else 2)

    asyncio.run(run())


def test_one_whose_client_leaves_with_its_last_byte_is_not_used_again() -> None:
    class Leaving(Heard):
        def response_bytes(self, data: bytes) -> None:
            super().response_bytes(data)
            assert self.connection is not None
            self.connection.abort()

    async def run() -> None:
        basin = Basin()
        sink = Leaving()
        basin.pool.send(ASKED, sink)
        while basin.pool._connecting:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        (line,) = basin.lines
        line.hear(SHORT[:-2], SHORT[-2:])
        assert (sink.body, sink.ended, sink.failures) == (b"hello", 0, [])
        assert line.wire.closing

    asyncio.run(run())
