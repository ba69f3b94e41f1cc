"""What a client can make the libraries below llmux write to the log."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
import uvloop
from daemon_host import certificate

from llmux.daemon.process import setup_logging

SECONDS = 30.0
BUFFERED = 40_000  # more than both sockets hold, less than pauses a stream


@pytest.fixture
def err(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a daemon writes."""
    loggers = [logging.getLogger(name) for name in ("", "llmux", "asyncio", "sanic.root")]
    levels, kept = [logger.level for logger in loggers], loggers[0].handlers[:]
    loggers[0].handlers[:] = []
    with open(tmp_path / "err", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        setup_logging(False)
        yield tmp_path / "err"
    loggers[0].handlers[:] = kept
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Stream(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.made, self.ended = asyncio.Event(), asyncio.Event()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.made.set()

    def eof_received(self) -> None:
        self.ended.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True


class Client:
    """One that reads nothing but the handshake."""

    def __init__(self, address: tuple[str, int], made: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.settimeout(SECONDS)
        self._socket.connect(address)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=made)
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")

    def shake_hands(self) -> None:
        done = False
        while not done:
            with suppress(ssl.SSLWantReadError):
                self._ssl.do_handshake()
                done = True
            self._socket.sendall(self._outgoing.read())
            if not done:
                self._incoming.write(self._socket.recv(4096))

    def say_goodbye(self) -> None:
        with suppress(ssl.SSLError):
            self._ssl.unwrap()
        self._socket.sendall(self._outgoing.read())

    def close(self) -> None:
        self._socket.close()


def test_a_tls_client_that_says_goodbye_amid_a_stream_costs_no_line_a_chunk(
    tmp_path: Path, err: Path
) -> None:
    made, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    async def body() -> None:
        stream = Stream()
        server = await asyncio.get_running_loop().create_server(
            lambda: stream, sock=listener, ssl=context
        )
        client = await asyncio.to_thread(Client, listener.getsockname(), made)
        await asyncio.to_thread(client.shake_hands)
        await stream.made.wait()
        assert stream.transport is not None
        stream.transport.write(b"x" * BUFFERED)
        await asyncio.to_thread(client.say_goodbye)
        await stream.ended.wait()
        for _ in range(20):
            stream.transport.write(b"x")
            await asyncio.sleep(0)
        assert not stream.lost, "it has yet to read what came before"
        stream.transport.abort()
        client.close()
        server.close()

    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await body()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())
    logging.getLogger("asyncio").error("a fault")
    assert err.read_text() == "<3>a fault\n"
