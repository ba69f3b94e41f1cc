"""How a connection to an engine is made: by its socket or its port, and again while it is busy."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import Any

import pytest
from engine_wire import ASKED, SHORT, Heard, Line, Wire

from llmux.gateway.engine import pool as pool_module
from llmux.gateway.engine.pool import EnginePool
from llmux.gateway.engine.request import EngineRequest
from llmux.gateway.http.multipart import Upload
from llmux.protocol import Address


class Engine:
    """Accepts, and answers each request. ``accepted``: connections."""

    def __init__(self) -> None:
        self.accepted = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        while await reader.read(1000):
            writer.write(SHORT)
        writer.close()


async def answered(pool: EnginePool) -> Heard:
    sink = Heard()
    pool.send(ASKED, sink)
    async with asyncio.timeout(60):
        while not (sink.ended or sink.failures):  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
    return sink


@pytest.mark.parametrize("kind", ["uds", "port"])
def test_an_engine_is_found_where_its_address_says(kind: str, tmp_path: Path) -> None:
    async def body() -> None:
        engine = Engine()
        if kind == "uds":
            server = await asyncio.start_unix_server(engine.serve, tmp_path / "s")
            address = Address(uds=str(tmp_path / "s"))
        else:
            server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
            address = Address(port=server.sockets[0].getsockname()[1])
        empty: list[bool] = []
        pool = EnginePool(address, lambda: empty.append(True))
        for _ in range(2):
            sink = await answered(pool)
            assert (sink.body, sink.failures) == (b"hello", [])
        assert engine.accepted == 1
        server.close()
        pool.close()
        async with asyncio.timeout(60):
            while not empty:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0)
        pool.reopen()
        (failure,) = (await answered(pool)).failures
        assert failure.error.startswith(f"cannot connect to the engine at {address}: ")
        assert not failure.connected

    asyncio.run(body())


class Full:
    """Its backlog is full for ``times`` attempts."""

    def __init__(self, times: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.number = times, number
        self.tried = 0
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", self.connect)
        self.turn = asyncio.sleep
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def connect(self, _factory: Any, path: str) -> Any:
        self.tried += 1
        if self.tried <= self.times:
            raise OSError(self.number, "busy")
        raise OSError(errno.ECONNREFUSED, f"nobody at {path}")

    async def sleep(self, seconds: float) -> None:
        if seconds:
            self.slept.append(seconds)
        await self.turn(0)


def test_one_with_a_full_backlog_is_tried_again_and_ever_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        engine = Full(7, errno.EAGAIN, monkeypatch)
        (failure,) = (await answered(EnginePool(Address(uds="/e"), lambda: None))).failures
        assert failure.error.endswith(": nobody at /e")
        assert engine.slept == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.1])

    asyncio.run(body())


def test_one_that_refuses_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        engine = Full(7, errno.EACCES, monkeypatch)
        (failure,) = (await answered(EnginePool(Address(uds="/e"), lambda: None))).failures
        assert failure.error.endswith(": busy")
        assert (engine.tried, engine.slept) == (1, [])

    asyncio.run(body())


def test_one_that_does_not_accept_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CONNECT_SECS", 0.01)

    async def body() -> None:
        async def never(_factory: Any, _path: str) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", never)
        (failure,) = (await answered(EnginePool(Address(uds="/e"), lambda: None))).failures
        assert failure.error.endswith(" does not accept connections")

    asyncio.run(body())


# ---- what an engine has read ---------------------------------------------------------------------


class Through(Wire):
    """A transport that writes to a socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def get_extra_info(self, name: str) -> Any:
        return {"socket": self.sock}[name]


def has_unread(line: Line) -> bool:
    return line.connection.unread


def test_a_request_is_unread_until_the_engine_has_all_of_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Line(wire=Through(ours))
        assert not has_unread(line), "nothing was sent"
        line.ask()
        assert has_unread(line)
        theirs.recv(len(ASKED.head))
        assert has_unread(line), "its body is there"
        theirs.recv(100)
        assert not has_unread(line)
        line.wire.buffered = 1
        assert has_unread(line), "a part is here"
        line.wire.buffered = 0
        line.hear(SHORT)
        line.ask()
        assert has_unread(line)
        line.hear(SHORT[:1])
        assert not has_unread(line), "it has begun to answer"


def test_what_was_not_sent_is_unread_and_of_a_port_nothing_is_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        upload = Upload()
        upload.write(b"form")
        line = Line(wire=Through(ours))
        line.connection.pause_writing()
        line.ask(EngineRequest(b"head", upload))
        theirs.recv(100)
        assert has_unread(line)
        line.connection.resume_writing()
        theirs.recv(100)
        assert not has_unread(line)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
    ):
        line = Line(wire=Through(ours))
        line.ask()
        assert not has_unread(line)
        line.wire.buffered = 1
        assert has_unread(line)
