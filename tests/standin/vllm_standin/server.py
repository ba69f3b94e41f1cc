"""The API server: routes, and the life of the tree seen from its root."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from . import completions, text
from .endpoints import Endpoints
from .engine_client import CallFailedError, EngineClient, EngineDeadError, EngineFailedError
from .faults import Faults
from .http import Connection, HttpError, Request, error_body
from .launch import Tree
from .metrics import Metrics
from .options import Options
from .process import log, raw

WHO = "APIServer"
VERSION = "0.32.0+standin"
EMBEDDING_DIMENSIONS = 64

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
        self._engine_missed = asyncio.Event()  # somebody was told that the engine is dead
        self._created = int(time.time())
        self._chunks_sent = 0
        self._load = 0
        self._endpoints = Endpoints(options, self._model_request, self._generate, self._embed)
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
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._plain),
            "/v1/embeddings": ("POST", self._embeddings),
            **self._endpoints.routes(),
        }
        if self._options.dev_mode:
            routes |= {
                "/sleep": ("POST", self._sleep),
                "/wake_up": ("POST", self._wake_up),
                "/is_sleeping": ("GET", self._is_sleeping),
                "/collective_rpc": ("POST", self._collective_rpc),
                "/reset_prefix_cache": ("POST", self._reset_prefix_cache),
            }
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

    # generation

    async def _chat(self, request: Request, connection: Connection) -> None:
        await self._complete(completions.CHAT, request, connection)

    async def _plain(self, request: Request, connection: Connection) -> None:
        await self._complete(completions.PLAIN, request, connection)

    async def _complete(self, kind: str, request: Request, connection: Connection) -> None:
        body = self._model_request(request)
        completion = completions.Completion(kind, body, self._options)
        if self._faults.take("completion_error"):
            raise CallFailedError("the stand-in engine was ordered to fail this completion")
        self._load += 1
        try:
            if completion.stream:
                await self._stream(completion, connection)
            else:
                async for sequence, output in self._generate(completion):
                    for _piece in sequence.take(output):
                        pass
                connection.respond_json(200, completion.response())
        finally:
            self._load -= 1

    async def _stream(self, completion: completions.Completion, connection: Connection) -> None:
        if self._engine.dead.is_set():
            raise EngineDeadError

        async def send(event: dict[str, Any]) -> None:
            data = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
            await connection.stream(f"data: {data}\n\n".encode())

        begun = False
        try:
            async for sequence, output in self._generate(completion):
                if not begun:
                    # vLLM's headers go out at once; the first chunk waits for the first token
                    begun = True
                    connection.begin_stream("text/event-stream; charset=utf-8")
                    for one in completion.sequences:
                        if (first := completion.first_chunk(one)) is not None:
                            await send(first)
                for piece in sequence.take(output):
                    await send(completion.chunk(sequence, piece))
                    self._count_chunk()
            if completion.include_usage:
                await send(completion.usage_chunk())
        except EngineDeadError as error:
            if not begun:
                raise
            await send(error_body(500, str(error), "InternalServerError"))
        await connection.stream(b"data: [DONE]\n\n")
        connection.end_stream()

    async def _generate(
        self, completion: completions.Completion
    ) -> AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]:
        """Outputs of all sequences as they come."""
        streams = [self._one(sequence) for sequence in completion.sequences]
        watches = {
            sequence.index: self._metrics.watch(
                text.count_tokens(sequence.engine_request["prompt"])
            )
            for sequence in completion.sequences
        }
        async for sequence, output in _merge(streams):
            watch = watches[sequence.index]
            watch.tokens(len(output["t"]))
            yield sequence, output
            if sequence.finish_reason is not None:
                watch.finish(sequence.finish_reason)

    async def _one(
        self, sequence: completions.Sequence
    ) -> AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]:
        outputs = self._engine.generate(sequence.engine_request)
        try:
            async for output in outputs:
                yield sequence, output
                if sequence.finish_reason is not None:
                    return  # a stop string: the core need not go on
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]  # it is a generator, typed wider

    def _count_chunk(self) -> None:
        order = self._faults.get("die_mid_stream")
        if not order:
            self._chunks_sent = 0
            return
        order = order if isinstance(order, dict) else {"after_chunks": int(order)}
        self._chunks_sent += 1
        if self._chunks_sent == int(order.get("after_chunks", 1)):
            self._kill_as_ordered(order.get("who", "tree"))

    async def _embeddings(self, request: Request, connection: Connection) -> None:
        body = self._model_request(request)
        inputs = completions.embedding_inputs(body)
        dimensions = body.get("dimensions") or EMBEDDING_DIMENSIONS
        encoding = body.get("encoding_format") or "float"
        data = []
        for index, item in enumerate(inputs):
            vector = text.embedding(self._options.name, item, dimensions, await self._embed(item))
            encoded = completions.encode_embedding(vector, encoding)
            data.append({"index": index, "object": "embedding", "embedding": encoded})
        tokens = sum(text.count_tokens(item) for item in inputs)
        self._metrics.prompt_tokens += tokens
        response = {
            "id": f"embd-{os.urandom(16).hex()}",
            "object": "list",
            "created": int(time.time()),
            "model": self._options.name,
            "data": data,
            "usage": {**completions.usage(tokens, 0), "prompt_tokens_details": None},
        }
        connection.respond_json(200, response)

    async def _embed(self, item: str) -> Any:
        """What the core makes of a text that is read and not gone on with."""
        engine_request = {
            "id": f"embd-{os.urandom(16).hex()}",
            "prompt": item,
            "max_tokens": 1,
            "embed": True,
        }
        content = None
        async for output in self._engine.generate(engine_request):
            if "content" not in output:
                raise CallFailedError("the request was aborted")
            content = output["content"]
        return content

    # asleep and awake

    async def _sleep(self, request: Request, connection: Connection) -> None:
        level = _level(request.query.get("level", ["1"])[-1])
        mode = request.query.get("mode", ["abort"])[-1]
        if mode not in ("abort", "wait", "keep"):
            raise _invalid_query("mode", "Input should be 'abort', 'wait' or 'keep'")
        await self._engine.call("sleep", level=level, mode=mode)
        self._metrics.asleep, self._metrics.sleep_level = True, level
        connection.respond_json(200, {"status": "sleeping", "level": level})

    async def _wake_up(self, request: Request, connection: Connection) -> None:
        tags = request.query.get("tags")
        log(WHO, f"wake up the engine with tags: {tags}")
        fully_awake = await self._engine.call("wake_up", tags=tags)
        self._metrics.asleep = not fully_awake
        status = "awake" if fully_awake else "sleeping"
        connection.respond_json(200, {"status": status, "tags": tags})

    async def _is_sleeping(self, _request: Request, connection: Connection) -> None:
        asleep = await self._engine.call("is_sleeping")
        connection.respond_json(200, {"is_sleeping": asleep})

    async def _collective_rpc(self, request: Request, connection: Connection) -> None:
        try:
            body = json.loads(request.body)
        except ValueError as error:
            raise HttpError(400, f"JSON decode error: {error}", "Bad Request") from None
        if not isinstance(body, dict):
            raise HttpError(400, "Request body must be a JSON object", "Bad Request")
        if body.get("method") is None:
            raise HttpError(400, "Missing 'method' in request body", "Bad Request")
        results = await self._engine.call("collective_rpc", rpc=str(body["method"]))
        connection.respond_json(200, {"results": results})

    async def _reset_prefix_cache(self, _request: Request, connection: Connection) -> None:
        success = await self._engine.call("reset_prefix_cache")
        connection.respond_json(200, {"success": success})

    # the rest

    async def _health(self, _request: Request, connection: Connection) -> None:
        connection.respond(503 if self._engine.dead.is_set() else 200)

    async def _server_load(self, _request: Request, connection: Connection) -> None:
        connection.respond_json(200, {"server_load": self._load})

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
        body = self._model_request(request)
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
        body = self._model_request(request)
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(one, int) for one in tokens):
            raise completions.missing("tokens")
        connection.respond_json(200, {"prompt": text.detokenize(tokens)})

    def _model_request(self, request: Request) -> dict[str, Any]:
        try:
            body = json.loads(request.body)
        except ValueError as error:
            message = (
                "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body', "
                f"'msg': 'JSON decode error', 'ctx': {{'error': '{error}'}}}}"
            )
            raise HttpError(400, message, "Bad Request", "body") from None
        if not isinstance(body, dict):
            raise HttpError(400, "the body must be a JSON object", "Bad Request", "body")
        model = body.get("model")
        # no model at all is the model there is, as for vLLM
        if model and model not in self._options.served_names:
            message = f"The model `{model}` does not exist."
            raise HttpError(404, message, "NotFoundError", "model")
        return body


async def _merge(
    streams: list[AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]],
) -> AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]:
    """Items of several streams as they come; the first failure is everybody's."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield item
        return
    queue: asyncio.Queue[tuple[completions.Sequence, dict[str, Any]] | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[tuple[completions.Sequence, dict[str, Any]]]) -> None:
        try:
            async for item in stream:
                queue.put_nowait(item)
        finally:
            queue.put_nowait(None)

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(pump(stream)) for stream in streams]
    try:
        for _ in range(len(tasks)):
            while (one := await queue.get()) is not None:
                yield one
        for task in tasks:
            await task  # an engine that died in between
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unauthorized(_request: Request, connection: Connection) -> None:
    connection.respond_json(401, {"error": "Unauthorized"})


def _level(value: str) -> int:
    if value not in ("0", "1", "2"):
        raise _invalid_query("level", "Input should be 0, 1 or 2")
    return int(value)


def _invalid_query(name: str, problem: str) -> HttpError:
    message = f"1 validation error:\n  {{'loc': 'query.{name}', 'msg': '{problem}'}}"
    return HttpError(400, message, "Bad Request", f"query.{name}")


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
