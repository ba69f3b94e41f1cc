"""A gateway worker without sockets: its link, its clients and its engines are played here."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from engine_wire import Wire

from llmux.config.schema import Config, GatewayConfig, Key, ModelConfig, PolicyConfig
from llmux.gateway import dispatch as dispatch_module
from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.admission.keys import LoadKeys
from llmux.gateway.control.context import Context
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.engine.answer_head import read_answer_head
from llmux.gateway.engine.request import EngineRequest
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.request_head import HeadReader
from llmux.gateway.metrics import MetricsPage
from llmux.gateway.supervisor import Supervisor
from llmux.gateway.worker import Worker
from llmux.protocol import Catalog, Grant, Message, ModelInfo

MODELS = ("alpha", "beta")


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class FakeLink:
    """``answer`` is what the supervisor says to an order: a value, or an error that is raised."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.asked: list[tuple[str, dict[str, Any], float]] = []
        self.answer: Callable[[str, dict[str, Any]], Any] = lambda _verb, _args: {}
        self.up = True
        self.connects = 1
        self.silent_secs = 0.25
        self.changed: list[str] = []
        self.here, self.away = asyncio.Event(), asyncio.Event()
        self.callbacks: dict[str, Any] = {}

    def send(self, message: Message) -> bool:
        self.sent.append(message)
        return True

    def demand_changed(self, model: str) -> None:
        self.changed.append(model)

    def attach(self, **callbacks: Any) -> None:
        self.callbacks = callbacks

    async def ask(self, verb: str, args: dict[str, Any], timeout: float) -> Any:
        self.asked.append((verb, args, timeout))
        answer = self.answer(verb, args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def gone_for(self, _seconds: float) -> None:
        await self.away.wait()


class FakePool:
    """The pool of a lease. ``sent``: each request with its sink."""

    made: list[FakePool] = []  # emptied for each desk

    def __init__(self, address: Any, on_empty: Callable[[], None]) -> None:
        self.address = address
        self.on_empty = on_empty
        self.sent: list[tuple[EngineRequest, Any]] = []
        self.closed = False
        self.empty = True
        self.made.append(self)

    def send(self, request: EngineRequest, sink: Any) -> None:
        self.sent.append((request, sink))
        sink.connection = FakeConnection()

    def close(self) -> None:
        self.closed = True
        if self.empty:
            self.on_empty()

    def reopen(self) -> None:
        self.closed = False


class FakeConnection:
    def __init__(self) -> None:
        self.until_close = False
        self.between_chunks = True
        self.calls: list[str] = []

    def abort(self) -> None:
        self.calls.append("abort")

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


class FakeClient:
    """``done``: for each end of an exchange, whether the connection is to be closed."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.transport: Any = self.wire
        self.writing_paused = False
        self.deadline = 0.0
        self.done: list[bool] = []
        self.aborted = 0

    def write(self, data: bytes) -> None:
        self.wire.write(data)

    def abort(self) -> None:
        self.aborted += 1

    def exchange_done(self, *, close: bool) -> None:
        self.done.append(close)

    @property
    def got(self) -> bytes:
        return b"".join(self.wire.written)


class Desk:
    """``now`` is the worker's clock."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        keys: LoadKeys | None = None,
        policy: PolicyConfig | None = None,
        config: Config | None = None,
        **gateway: Any,
    ) -> None:
        monkeypatch.setattr(dispatch_module, "EnginePool", FakePool)
        FakePool.made.clear()
        self.link = FakeLink()
        self.config = config or Config(
            models=MappingProxyType({name: ModelConfig(name, f"/m/{name}") for name in MODELS}),
            policy=policy or PolicyConfig(request_timeout_secs=30.0),
            gateway=GatewayConfig(**gateway),
        )
        loop = asyncio.get_running_loop()
        self.now = 1000.0
        monkeypatch.setattr(loop, "time", lambda: self.now)
        self.worker: Worker[Exchange] = Worker(
            self.config,
            self.link,  # type: ignore[arg-type]
            name="w1",
            keys=keys,
        )
        self.dispatch = Dispatch(self.worker)
        self.page = MetricsPage(self.dispatch)
        self.supervisor = Supervisor(self.dispatch, self.page.snapshot)

    def grant(self, model: str = "alpha", epoch: str = "e1") -> FakePool:
        self.supervisor.on_message(Grant(model, epoch, port=1))
        lease = self.worker.admission.held(model)
        assert lease is not None
        pool: FakePool = lease.pool
        return pool

    def catalog(self, *infos: ModelInfo, **times: float) -> None:
        listed = infos or tuple(
            ModelInfo(name, "stopped", aliases=[f"{name}-2"]) for name in MODELS
        )
        catalog = Catalog.of(list(listed))
        self.supervisor.on_message(Catalog(catalog.models, dict(times)))

    def incoming(
        self,
        body: bytes = b'{"model":"alpha"}',
        *headers: str,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        version: str = "1.1",
        keep_alive: bool = True,
    ) -> Incoming:
        made = Incoming(self.worker.bodies)
        made.method, made.target, made.body = method.encode(), path.encode(), body
        host = () if any(header.startswith("Host: ") for header in headers) else ("Host: x",)
        named = [header.partition(": ") for header in (*host, "X-Request-Id: r1", *headers)]
        made.headers = [(name.encode(), value.encode()) for name, _, value in named]
        made.read_head(version, HeadReader())
        made.keep_alive = keep_alive
        made.find_route()
        return made

    def asks(self, incoming: Incoming | None = None) -> tuple[FakeClient, Exchange]:
        incoming = incoming or self.incoming()
        assert incoming.match is not None
        client = FakeClient()
        exchange = self.dispatch.exchange(client, incoming, incoming.match)
        self.dispatch.submit(exchange)
        return client, exchange


def answers(exchange: Exchange, data: bytes, *, until_close: bool = False) -> None:
    """The engine's head and what came with it."""
    head, _, first = data.partition(b"\r\n\r\n")
    connection: Any = exchange.connection
    connection.until_close = until_close
    exchange.response_head(*read_answer_head(head + b"\r\n\r\n", int(data[9:12])), first)


def told(client: FakeClient) -> tuple[int, str, str]:
    """(status, code, message) of an error response."""
    head, _, body = client.got.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    return int(head[9:12]), error["code"], error["message"]


def retry_after(client: FakeClient) -> int | None:
    lines = client.got.partition(b"\r\n\r\n")[0].split(b"\r\n")
    found = [int(line[13:]) for line in lines if line.startswith(b"retry-after: ")]
    return found[0] if found else None


def said(desk: Desk, kind: type[Message]) -> list[Message]:
    return [message for message in desk.link.sent if isinstance(message, kind)]


# ---- requests to the worker itself ---------------------------------------------------------------


def a_request(desk: Desk, *, key: Key | None = None, **more: Any) -> Any:
    use = None
    if key is not None:
        use = KeyUse(key, 1, desk.worker.clock)
    ctx = SimpleNamespace(key=use, origin=more.pop("origin", b""))
    app = SimpleNamespace(ctx=SimpleNamespace(context=Context(desk.worker, desk.page)))
    given: dict[str, Any] = {
        "method": "GET", "body": b"", "headers": {}, "args": {}, "query_string": "", "path": "/x",
        "raw_url": b"/x",
    }  # fmt: skip
    return SimpleNamespace(app=app, conn_info=SimpleNamespace(ctx=ctx), **(given | more))


def body_of(response: Any) -> Any:
    return json.loads(response.body)
