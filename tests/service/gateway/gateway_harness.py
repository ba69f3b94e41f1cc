"""What the gateway's service tests stand on: a supervisor, engines, clients, on real sockets.

Nothing here sleeps: every wait is for something to be seen, under the test's own deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import uvloop

from llmux.config.keyfile import hash_key
from llmux.config.schema import Config, GatewayConfig, Key, KeyRole, ModelConfig, PolicyConfig
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.server import serve_gateway
from llmux.gateway.worker import Worker
from llmux.protocol import (
    Address,
    Ask,
    Catalog,
    Demand,
    Grant,
    Hello,
    Message,
    ModelInfo,
    Revoke,
    decode,
)

M = TypeVar("M", bound=Message)

ADMIN = "x-api-key: sk-admin"  # the header of a client that may give orders
ADMINS = (Key("admin", hash_key("sk-admin"), role=KeyRole.ADMIN),)
SECONDS = 30.0  # how long any single wait in a test may take
MODELS = ("alpha", "beta")
ALIASES = {"alpha": ("alef", "org/alpha")}


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in uvloop, as the product does, under one deadline."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(120):
                await test(*args, **kwargs)

        run_in_uvloop(bounded())

    return run


_unclosed: list[asyncio.Runner] = []


def run_in_uvloop(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; the loop is closed only after a success.

    What a failed test leaves open can keep uvloop's ``close`` in its C loop for ever, where no
    timeout reaches it: the failure would never be seen.
    """
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        runner.run(work)
    except BaseException:
        _unclosed.append(runner)  # nor collected, which would fail the tests after this one
        raise
    runner.close()


async def soon(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(SECONDS):
        return await awaitable


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop until something in this same process is true. What takes more than a few turns
    waits for a timer, and need not keep a processor busy."""
    async with asyncio.timeout(SECONDS):
        turns = 0
        while not condition():  # the condition has no event of its own
            await asyncio.sleep(0 if turns < 100 else 0.001)
            turns += 1


# ---- the supervisor -----------------------------------------------------------------------------


class FakeSupervisor:
    """Speaks the protocol on a unix socket; records what it hears; says what a test tells it.

    ``signs``: how often it was asked whether it lives; this comes at any time, and is not in
    ``heard``.
    """

    def __init__(self, path: str, *, models: tuple[str, ...] = MODELS) -> None:
        self.path = path
        self.models = models
        self.heard: list[Message] = []
        self.signs = 0
        self.hellos: list[Hello] = []
        self.demands: dict[tuple[asyncio.StreamWriter, str], Demand] = {}  # the last of each peer
        self.answer: Callable[[Any], dict[str, Any]] = lambda _ask: {"ok": True, "result": {}}
        self.answers = True  # else a test does
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._read = 0

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=1 << 20)

    async def stop(self) -> None:
        """As a crash: the socket file goes and every connection with it."""
        assert self._server is not None
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        for writer in list(self._writers):
            writer.transport.abort()
        await until(lambda: not self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                message = decode(line)
                if isinstance(message, Ask) and message.verb == "alive":
                    self.signs += 1
                else:
                    self.heard.append(message)
                if isinstance(message, Demand):
                    self.demands[writer, message.model] = message
                if isinstance(message, Hello):
                    self.hellos.append(message)
                    infos = [
                        ModelInfo(name, "stopped", aliases=list(ALIASES.get(name, ())))
                        for name in self.models
                    ]
                    writer.write(Catalog.of(infos).encode())
                elif isinstance(message, Ask) and self.answers:
                    body = {"type": "answer", "id": message.id, **self.answer(message)}
                    writer.write(json.dumps(body).encode() + b"\n")
                self._news.set()
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def say(self, *messages: Message) -> None:
        data = b"".join(message.encode() for message in messages)
        for writer in self._writers:
            writer.write(data)

    def grant(self, engine: StubEngine, model: str = "alpha", epoch: str = "e1") -> None:
        self.say(Grant(model, epoch, uds=engine.address.uds, port=engine.address.port))

    def revoke(self, epoch: str, model: str = "alpha") -> None:
        self.say(Revoke(model, epoch))

    async def hear(self, kind: type[M], where: Callable[[M], bool] = lambda _m: True) -> M:
        """The next message of that kind for which ``where`` holds, skipping what came before it."""
        async with asyncio.timeout(SECONDS):
            while True:
                while self._read < len(self.heard):
                    message = self.heard[self._read]
                    self._read += 1
                    if isinstance(message, kind) and where(message):
                        return message
                self._news.clear()
                await self._news.wait()


# ---- engines ------------------------------------------------------------------------------------


@dataclass
class EngineRequest:
    """What an engine got, and the means to answer it byte by byte."""

    line: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int  # on its connection, from 1
    raw_head: bytes = b""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def json(self, payload: Any, status: str = "200 OK") -> None:
        body = json.dumps(payload).encode()
        self.writer.write(
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nserver: stub\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def start_stream(self) -> None:
        self.writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    def event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.event("[DONE]")
        self.writer.write(b"0\r\n\r\n")

    def die(self) -> None:
        self.writer.transport.abort()


Handler = Callable[[EngineRequest], Awaitable[None]]


async def echo(request: EngineRequest) -> None:
    request.json({"model": json.loads(request.body)["model"], "echo": len(request.body)})


class StubEngine:
    """A keep-alive HTTP server whose answers a test scripts. ``requests`` are all it ever got."""

    def __init__(self, handler: Handler = echo, *, path: str | None = None) -> None:
        self.handler = handler
        self.path = path
        self.address = Address(uds=path)
        self.requests: list[EngineRequest] = []
        self.connections: set[asyncio.StreamWriter] = set()
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._news = asyncio.Event()

    async def start(self) -> None:
        if self.path is not None:
            self._server = await asyncio.start_unix_server(self._serve, self.path)
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.address = Address(port=self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()
        await until(lambda: not self.connections)

    async def next_request(self, number: int) -> EngineRequest:
        async with asyncio.timeout(SECONDS):
            while len(self.requests) < number:
                self._news.clear()
                await self._news.wait()
        return self.requests[number - 1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        self.accepted += 1
        number = 0
        try:
            while True:
                number += 1
                request = await self._read(reader, writer, number)
                self.requests.append(request)
                self._news.set()
                await self.handler(request)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for request in self.requests:
                if request.writer is writer:
                    request.gone.set()
            self.connections.discard(writer)
            writer.close()

    @staticmethod
    async def _read(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> EngineRequest:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head[:-4].decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for text in lines:
            name, _, value = text.partition(":")
            assert name.lower() not in headers, f"header {name} twice"
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers["content-length"]))
        return EngineRequest(line, headers, body, reader, writer, number, raw_head=head)


async def eof_watch(request: EngineRequest) -> None:
    """Returns when the gateway closed the connection the request came on."""
    assert await soon(request.reader.read(1)) == b"", "the gateway sent something unasked"
    request.gone.set()


# ---- clients ------------------------------------------------------------------------------------


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


class Client:
    """One connection to the gateway, with every byte in the test's hands."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(
        self,
        path: str = "/v1/chat/completions",
        payload: Any = None,
        *,
        method: str = "POST",
        body: bytes | None = None,
        headers: tuple[str, ...] = (),
        version: str = "1.1",
    ) -> None:
        if body is None:
            body = b"" if payload is None else json.dumps(payload).encode()
        lines = [f"{method} {path} HTTP/{version}", "Host: test", f"Content-Length: {len(body)}"]
        self.writer.write("\r\n".join([*lines, *headers, "", ""]).encode() + body)

    def chat(self, model: str = "alpha", **more: Any) -> None:
        self.send(payload={"model": model, "messages": [{"role": "user", "content": "hi"}], **more})

    async def head(self) -> Response:
        raw = await soon(self.reader.readuntil(b"\r\n\r\n"))
        line, *lines = raw[:-4].decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for text in lines:
            name, _, value = text.partition(":")
            assert name.lower() not in headers, f"header {name} twice"
            headers[name.lower()] = value.strip()
        return Response(int(line.split()[1]), headers)

    async def chunk(self) -> bytes:
        """The next chunk of a chunked answer; b"" is the last."""
        size = int(await soon(self.reader.readline()), 16)
        data: bytes = await soon(self.reader.readexactly(size + 2))
        return data[:-2]

    async def answer(self) -> Response:
        response = await self.head()
        if response.headers.get("transfer-encoding") == "chunked":
            while data := await self.chunk():
                response.body += data
        elif "content-length" in response.headers:
            size = int(response.headers["content-length"])
            response.body = await soon(self.reader.readexactly(size))
        else:
            response.body = await soon(self.reader.read())
        return response

    async def ended(self) -> bytes:
        """Everything until the gateway closes the connection."""
        data: bytes = await soon(self.reader.read())
        return data

    def leave(self) -> None:
        self.writer.transport.abort()


# ---- all together -------------------------------------------------------------------------------


@dataclass
class Stage:
    supervisor: FakeSupervisor
    gateway: Worker[Exchange]
    port: int
    stop: asyncio.Event
    served: asyncio.Task[None]
    directory: Path
    clients: list[Client] = field(default_factory=list)
    engines: list[StubEngine] = field(default_factory=list)

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16)
        client = Client(reader, writer)
        self.clients.append(client)
        return client

    async def engine(self, handler: Handler = echo, *, name: str = "engine") -> StubEngine:
        engine = StubEngine(handler, path=str(self.directory / f"{name}.sock"))
        await engine.start()
        self.engines.append(engine)
        return engine

    async def granted(self, handler: Handler = echo, *, name: str = "engine") -> StubEngine:
        """An engine that serves alpha, epoch e1."""
        engine = await self.engine(handler, name=name)
        self.supervisor.grant(engine)
        return engine

    async def chat(self, model: str = "alpha", **more: Any) -> Client:
        """A client that has asked."""
        client = await self.client()
        client.chat(model, **more)
        return client

    async def streaming(self) -> Client:
        """A client that has read the first event, "one", of its stream."""
        client = await self.chat(stream=True)
        await client.head()
        assert await client.chunk() == b"data: one\n\n"
        return client

    def in_flight(self, model: str = "alpha") -> int:
        return self.gateway.admission.demand(model).in_flight

    def waiting(self, model: str = "alpha") -> int:
        return self.gateway.admission.demand(model).waiting


def a_config(
    *, wait_secs: float = 30.0, max_waiting: int = 100, max_body_bytes: int = 8 << 20, **more: Any
) -> Config:
    return Config(
        models=MappingProxyType({name: ModelConfig(name, f"/models/{name}") for name in MODELS}),
        policy=PolicyConfig(request_timeout_secs=wait_secs),
        gateway=GatewayConfig(max_waiting=max_waiting, max_body_bytes=max_body_bytes, **more),
    )


@asynccontextmanager
async def stage(
    config: Config | None = None, *, also: tuple[socket.socket, ...] = (), **serve: Any
) -> AsyncIterator[Stage]:
    """A gateway that is up and connected to a fake supervisor. All ends with the block."""
    with tempfile.TemporaryDirectory(prefix="llmux-gw-") as name:
        directory = Path(name)
        supervisor = FakeSupervisor(str(directory / "supervisor.sock"))
        await supervisor.start()
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        stop = asyncio.Event()
        started: asyncio.Future[Worker[Exchange]] = asyncio.get_running_loop().create_future()
        served = asyncio.get_running_loop().create_task(
            serve_gateway(
                config or a_config(),
                link=supervisor.path,
                sockets=[listener, *also],
                stop=stop,
                on_started=started.set_result,
                **serve,
            )
        )
        gateway = await soon(started)
        running = Stage(supervisor, gateway, port, stop, served, directory)
        try:
            yield running
        finally:
            for client in running.clients:
                client.leave()
            for engine in running.engines:
                await engine.stop()
            stop.set()
            await soon(served)
            await supervisor.stop()
