"""vLLM's development endpoints: asleep and awake, and calls of the workers' methods."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from ..engine_client import EngineClient
from ..process import log
from .http import Connection, HttpError, Request
from .metrics import Metrics

WHO = "APIServer"


class Development:
    """There only with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, engine: EngineClient, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics

    def routes(self) -> dict[str, tuple[str, Callable[[Request, Connection], Awaitable[None]]]]:
        return {
            "/sleep": ("POST", self._sleep),
            "/wake_up": ("POST", self._wake_up),
            "/is_sleeping": ("GET", self._is_sleeping),
            "/collective_rpc": ("POST", self._collective_rpc),
            "/reset_prefix_cache": ("POST", self._reset_prefix_cache),
        }

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
        results = await self._engine.call(
            "collective_rpc", rpc=str(body["method"]), kwargs=body.get("kwargs", {})
        )
        connection.respond_json(200, {"results": results})

    async def _reset_prefix_cache(self, _request: Request, connection: Connection) -> None:
        success = await self._engine.call("reset_prefix_cache")
        connection.respond_json(200, {"success": success})


def _level(value: str) -> int:
    if value not in ("0", "1", "2"):
        raise _invalid_query("level", "Input should be 0, 1 or 2")
    return int(value)


def _invalid_query(name: str, problem: str) -> HttpError:
    message = f"1 validation error:\n  {{'loc': 'query.{name}', 'msg': '{problem}'}}"
    return HttpError(400, message, "Bad Request", f"query.{name}")
