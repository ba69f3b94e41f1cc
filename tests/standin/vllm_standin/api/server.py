"""The API server: routes, and the life of the tree seen from its root."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from .. import text
from ..engine_client import CallFailedError, EngineClient, EngineDeadError, EngineFailedError
from ..faults import Faults
from ..launch import Tree
from ..options import Options
from ..process import log, raw
from . import completions
from .development import Development
from .endpoints import Endpoints
from .generation import Generation
from .http import Connection, HttpError, Request, error_body
from .metrics import Metrics

WHO = "APIServer"
VERSION = "0.32.0+standin"

# How long the core may take to go after SIGTERM before it is killed.
CORE_EXIT_SECS = 2.0

# How long answers under way may take once the engine is dead.
LAST_ANSWERS_SECS = 1.0

Handler = Callable[[Request, Connection], Awaitable[None]]


class OrderedDeathError(Exception):
    """The fault of dying at start."""

    def __init__(self, order: dict[str, Any]) -> None:
        super().__init__()
        self.exit_code = int(order.get("exit_code", 1))
        self.lines: list[str] = order.get(
            "lines", ["ValueError: the stand-in engine was ordered to die at start"]
        )


class Server:
    """One engine's front: HTTP in, requests to the core out."""

    def __init__(
        self, options: Options, faults: Faults, listener: socket.socket, tree: Tree
    ) -> None:
        self._options = options
        self._faults = faults
        self._listener = listener
        self._tree = tree
        self._engine = EngineClient()
        self._metrics = Metrics(options)
        self._connections: set[Connection] = set()
        self._stop = asyncio.Event()
        self._engine_missed = asyncio.Event()  # a client was told that the engine is dead
        self._created = int(time.time())
        self._generation = Generation(
            options, faults, self._engine, self._metrics, self._kill_as_ordered
        )
        self._endpoints = Endpoints(
            options,
            self._generation.model_request,
            self._generation.generate,
            self._generation.embed,
        )
        self._routes = self._make_routes()

    # life

    async def run(self) -> int:
        """Until SIGTERM, or until there is no engine; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        starting = loop.create_task(self._start())
        stopping = loop.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            self._end_tree(signal.SIGTERM)
            return 0
        try:
            server = starting.result()
        except OrderedDeathError as death:
            self._end_tree(signal.SIGKILL)
            raw("".join(f"{line}\n" for line in death.lines))
            return death.exit_code
        except EngineFailedError as error:
            self._end_tree(signal.SIGKILL)
            raw(
                "RuntimeError: Engine core initialization failed. See root cause above. "
                f"Failed core proc(s): {{}} ({error})\n"
            )
            return 1
        watch = loop.create_task(self._watch_engine())
        await stopping
        watch.cancel()
        server.close()
        await self._end_connections()
        self._end_tree(signal.SIGTERM)
        log(WHO, "Application shutdown complete.")
        return 0

    async def _start(self) -> asyncio.Server:
        order = self._faults.get("die_at_start")
        if order:
            order = order if isinstance(order, dict) else {}
            await asyncio.sleep(float(order.get("after_secs", 0)))
            raise OrderedDeathError(order)
        await self._engine.start(self._tree.core)
        log(WHO, f"GPU KV cache size: {self._engine.kv_bytes} bytes per GPU")
        loop = asyncio.get_running_loop()
        self._listener.listen(2048)
        self._listener.setblocking(False)

        def connect() -> Connection:
            return Connection(self._answer, self._options.keep_alive_secs, self._connections)

        if self._options.uds is not None:
            server = await loop.create_unix_server(connect, sock=self._listener, backlog=2048)
        else:
            server = await loop.create_server(connect, sock=self._listener, backlog=2048)
        log(WHO, f"Started server process [{os.getpid()}]")
        if not self._faults.get("never_healthy"):
            log(WHO, "Application startup complete.")
        return server

    def _on_stop_signal(self) -> None:
        if self._faults.get("ignore_sigterm"):
            log(WHO, "SIGTERM ignored, as ordered", "WARNING")
            return
        self._stop.set()

    async def _watch_engine(self) -> None:
        """End when the engine is dead: at the first request that meets it, or a little later."""
        await self._engine.dead.wait()
        log(WHO, "AsyncLLM output_handler failed: EngineDeadError", "ERROR")
        try:
            async with asyncio.timeout(self._options.dead_exit_secs):
                await self._engine_missed.wait()
        except TimeoutError:
            pass
        self._stop.set()

    async def _end_connections(self) -> None:
        if self._engine.dead.is_set():
            for connection in list(self._connections):
                connection.finish()
            answering = [one.task for one in self._connections if one.task is not None]
            if answering:
                await asyncio.wait(answering, timeout=LAST_ANSWERS_SECS)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # the closing itself happens in the loop's next turn

    def _end_tree(self, number: int) -> None:
        """No child is left; the tracker goes last, as it unlinks what is in /dev/shm."""
        _kill(self._tree.core_pid, number)
        deadline = time.monotonic() + CORE_EXIT_SECS
        while not _reaped(self._tree.core_pid):
            if time.monotonic() > deadline:
                _kill(self._tree.core_pid, signal.SIGKILL)
            time.sleep(0.001)
        os.close(self._tree.tracker)
        os.waitpid(self._tree.tracker_pid, 0)

    def _kill_as_ordered(self, who: str) -> None:
        core = [self._tree.core_pid]
        workers = self._engine.worker_pids
        match who:
            case "core":
                victims = core
            case "worker":
                victims = workers[:1]
            case _:
                # the whole tree, ourselves last
                victims = [*workers, *core, self._tree.tracker_pid, os.getpid()]
        for pid in victims:
            _kill(pid, signal.SIGKILL)

    # requests

    def _make_routes(self) -> dict[str, tuple[str, Handler]]:
        routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/ping": ("GET", self._health),
            "/load": ("GET", self._server_load),
            "/metrics": ("GET", self._show_metrics),
            "/version": ("GET", self._version),
            "/openapi.json": ("GET", self._openapi),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._generation.chat),
            "/v1/completions": ("POST", self._generation.plain),
            "/v1/embeddings": ("POST", self._generation.embeddings),
            **self._endpoints.routes(),
        }
        if self._options.dev_mode:
            routes |= Development(self._engine, self._metrics).routes()
        return routes

    async def _answer(self, request: Request, connection: Connection) -> None:
        if self._faults.get("never_healthy"):
            await asyncio.Event().wait()
        try:
            await self._route(request)(request, connection)
        except HttpError as error:
            connection.respond_json(error.status, error.body)
        except EngineDeadError as error:
            self._engine_missed.set()
            connection.respond_json(500, error_body(500, str(error), "InternalServerError"))
        except CallFailedError as error:
            connection.respond_json(500, error_body(500, str(error), "InternalServerError"))
        except Exception as error:  # noqa: BLE001  # vLLM too makes a 500 of whatever it is
            log(WHO, f"Exception in ASGI application: {error!r}", "ERROR")
            if connection.status:
                connection.abort()  # in mid-answer there is no other way to say so
            else:
                connection.respond_json(500, error_body(500, str(error), "InternalServerError"))
        if self._options.access_log:
            line = f'"{request.method} {request.path} HTTP/1.1" {connection.status}'
            log(WHO, line)

    def _route(self, request: Request) -> Handler:
        key = self._options.api_key
        if (
            key is not None
            and request.path.startswith("/v1")
            and request.headers.get("authorization") != f"Bearer {key}"
        ):
            return _unauthorized
        if request.path.startswith("/v1/responses/"):
            return self._endpoints.by_id
        if request.path not in self._routes:
            raise HttpError(404, "Not Found", "Not Found")
        method, handler = self._routes[request.path]
        if request.method != method:
            raise HttpError(405, "Method Not Allowed", "Method Not Allowed")
        return handler

    # the rest

    async def _health(self, _request: Request, connection: Connection) -> None:
        connection.respond(503 if self._engine.dead.is_set() else 200)

    async def _server_load(self, _request: Request, connection: Connection) -> None:
        connection.respond_json(200, {"server_load": self._generation.load})

    async def _show_metrics(self, _request: Request, connection: Connection) -> None:
        body = self._metrics.render(self._engine.running, self._engine.waiting)
        connection.respond(200, body.encode(), "text/plain; version=0.0.4; charset=utf-8")

    async def _version(self, _request: Request, connection: Connection) -> None:
        connection.respond_json(200, {"version": VERSION})

    async def _openapi(self, _request: Request, connection: Connection) -> None:
        paths = {
            path: {method.lower(): {"responses": {"200": {"description": "Successful Response"}}}}
            for path, (method, _handler) in self._routes.items()
            if path != "/openapi.json"
        }
        info = {"title": "FastAPI", "version": "0.1.0"}
        connection.respond_json(200, {"openapi": "3.1.0", "info": info, "paths": paths})

    async def _models(self, _request: Request, connection: Connection) -> None:
        permission = {
            "id": f"modelperm-{os.urandom(16).hex()}",
            "object": "model_permission",
            "created": self._created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": self._options.model,
                "parent": None,
                "max_model_len": self._options.max_model_len,
                "permission": [permission],
            }
            for name in self._options.served_names
        ]
        connection.respond_json(200, {"object": "list", "data": cards})

    async def _tokenize(self, request: Request, connection: Connection) -> None:
        body = self._generation.model_request(request)
        if "messages" in body:
            prompt = completions.chat_prompt(body["messages"])
        elif isinstance(body.get("prompt"), str):
            prompt = body["prompt"]
        else:
            raise completions.missing("prompt")
        tokens = text.tokenize(prompt)
        content = {
            "count": len(tokens),
            "max_model_len": self._options.max_model_len,
            "tokens": tokens,
            "token_strs": None,
        }
        connection.respond_json(200, content)

    async def _detokenize(self, request: Request, connection: Connection) -> None:
        body = self._generation.model_request(request)
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(one, int) for one in tokens):
            raise completions.missing("tokens")
        connection.respond_json(200, {"prompt": text.detokenize(tokens)})


async def _unauthorized(_request: Request, connection: Connection) -> None:
    connection.respond_json(401, {"error": "Unauthorized"})


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def serve(options: Options, faults: Faults, listener: socket.socket, tree: Tree) -> int:
    async def run() -> int:
        return await Server(options, faults, listener, tree).run()

    return asyncio.run(run())
