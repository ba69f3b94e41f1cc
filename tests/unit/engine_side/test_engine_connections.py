"""Connections to an engine: closed when the answer is there, given up whole, and bounded."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmux.drivers.engine import vllm
from llmux.drivers.engine.http import Reply, Unreachable, exchange
from llmux.drivers.engine.vllm import VllmEngine
from llmux.protocol import Address

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def engine(place: Path, answer: bytes | None) -> Iterator[Address]:
    """Takes one connection, answers at once, and keeps it; None: neither reads nor answers."""
    kept: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "s"))
        listener.listen()

        def serve() -> None:
            taken, _ = listener.accept()
            kept.append(taken)
            if answer is not None:
                taken.recv(65536)
                taken.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address(uds=str(place / "s"))
        finally:
            thread.join(30)
            for taken in kept:
                taken.close()


def sockets() -> int:
    return sum(
        os.path.islink(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        for fd in os.listdir("/proc/self/fd")
    )


def test_no_connection_is_left_when_the_answer_is_there(tmp_path: Path) -> None:
    """A dump of the engine may come next."""

    async def body(address: Address) -> None:
        before = sockets()
        assert await exchange(address, "GET", "/") == Reply(200, b"ok")
        assert sockets() == before + 1, "the engine's end, and none of ours"

    with engine(tmp_path, OK) as address:
        asyncio.run(body(address))


def test_what_an_engine_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    async def body(address: Address) -> None:
        before = sockets()
        asking = asyncio.create_task(exchange(address, "POST", "/", bytes(8 << 20)))
        for _ in range(50):  # turns of the loop: it is connected, and has written what it can
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert sockets() <= before + 1

    with engine(tmp_path, None) as address:
        asyncio.run(body(address))


def test_an_answer_counts_though_not_all_of_the_request_was_read(tmp_path: Path) -> None:
    async def body() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()

            def serve() -> None:
                with listener.accept()[0] as taken:
                    taken.recv(10)
                    taken.sendall(OK)

            thread = threading.Thread(target=serve)
            thread.start()
            address = Address(uds=str(tmp_path / "s"))
            assert await exchange(address, "POST", "/", bytes(8 << 20)) == Reply(200, b"ok")
            thread.join(30)

    asyncio.run(body())


@pytest.mark.parametrize("size", [2 << 20, (2 << 20) + 1])
def test_an_answer_has_2_mib_at_most(tmp_path: Path, size: int) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)

    async def body() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            try:
                await writer.drain()
                await reader.read()
            except ConnectionError:
                pass
            finally:
                writer.close()

        address = Address(uds=str(tmp_path / "s"))
        async with await asyncio.start_unix_server(serve, address.uds):
            if size == 2 << 20:
                assert len((await exchange(address, "GET", "/")).body) == size
            else:
                with pytest.raises(Unreachable, match="longer than 2097152 bytes"):
                    await exchange(address, "GET", "/")

    asyncio.run(body())


def test_500_characters_of_an_answer_are_shown() -> None:
    assert Reply(500, b"x" * 500).excerpt == "x" * 500
    assert Reply(500, b"x" * 501).excerpt == "x" * 500 + "…"


@pytest.mark.parametrize("path", ["/no/such/socket", "/\ud800", "/" + "x" * 200])
def test_a_socket_that_cannot_be_is_one_that_does_not_answer(path: str) -> None:
    with pytest.raises(Unreachable):
        asyncio.run(exchange(Address(uds=path), "GET", "/"))


def renamed(place: Path, listener: socket.socket) -> None:
    listener.bind(str(place / "t"))
    listener.listen()
    os.rename(place / "t", place / "s")


def bound(place: Path, listener: socket.socket) -> None:
    listener.bind(str(place / "s"))
    listener.listen()


def opened(place: Path, listener: socket.socket) -> None:
    (place / "s").chmod(0o666)


@pytest.mark.parametrize("appear", [bound, renamed, opened])
def test_a_socket_is_used_as_soon_as_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appear: Callable[[Path, socket.socket], None]
) -> None:
    """Not when the pause is over, which here it never is."""
    monkeypatch.setattr(vllm, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(vllm, "LAST_PAUSE", 1000.0)

    async def body(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        # The first look is over when the loop has turned some times.
        looked = asyncio.Event()

        async def healthy() -> None:
            wait = asyncio.create_task(VllmEngine().wait_healthy(Address(uds=str(place)), 60))
            for _ in range(20):
                await asyncio.sleep(0)
            looked.set()
            await wait

        async def come() -> None:
            await looked.wait()
            if appear is opened:
                listener.listen()
            appear(tmp_path, listener)
            taken, _ = await loop.sock_accept(listener)
            await loop.sock_recv(taken, 4096)
            await loop.sock_sendall(taken, OK)
            taken.close()

        await asyncio.gather(healthy(), come())

    place = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        if appear is opened:
            listener.bind(str(place))
        asyncio.run(body(listener))
