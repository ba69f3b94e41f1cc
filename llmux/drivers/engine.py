"""vLLM's HTTP control API: health, sleep and wake, workers' methods, the canary.

Only requests that llmux itself makes go this way; clients' requests go straight from the gateway to
the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlencode

from llmux.drivers.engine_http import Reply, Unreachable, exchange
from llmux.drivers.inotify import Inotify, Mask
from llmux.errors import DriverTimeout, EngineUnhealthy
from llmux.ports import Canary
from llmux.protocol import Address

# Worker methods by which an engine takes its communicators down and sets them up again: vLLM's own
# since 0.32, and those of the patches that were used before.
COMMUNICATOR_HOOKS: Final = {
    False: ("checkpoint_prepare", "suspend_nccl"),
    True: ("checkpoint_restore", "resume_nccl"),
}
# Seconds. What vLLM does after a failed wake is worth two more tries; a third never helped (two
# years of reports on the earlier program).
RETRY_PAUSES: Final = (0.5, 1.0)
PROBE_TIMEOUT: Final = 5.0  # one /health: a busy API server answers late, a hung one never
FIRST_PAUSE: Final = 0.005
LAST_PAUSE: Final = 0.25
CANARY_PROMPT: Final = "The capital of France is"
CANARY_TOKENS: Final = 8


class _Operation:
    """What is done to which engine and until when: the subject of the errors and the one deadline
    of all requests that it takes. ``name`` completes "cannot … the engine at …"."""

    def __init__(self, name: str, address: Address, deadline: float) -> None:
        self._name = name
        self._address = address
        self.limit = f"{deadline:g}s"
        self._end = time.monotonic() + deadline

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def timeout(self, text: str) -> DriverTimeout:
        return DriverTimeout(self._name, f"the engine at {self._address}", text)

    def failure(
        self, text: str, *, hint: str | None = None, status: int | None = None
    ) -> EngineUnhealthy:
        fields = {} if status is None else {"status": status}
        target = f"the engine at {self._address}"
        return EngineUnhealthy(self._name, target, text, hint=hint, **fields)

    def bad_answer(self, path: str, reply: Reply) -> EngineUnhealthy:
        hint = None
        if reply.status in (404, 405):
            hint = "is VLLM_SERVER_DEV_MODE=1 in its environment, and this vLLM recent enough?"
        text = f"{path} answered {reply.status}: {reply.excerpt or '(no body)'}"
        return self.failure(text, hint=hint, status=reply.status)

    async def request(
        self, method: str, path: str, payload: Mapping[str, Any] | None = None
    ) -> Reply:
        """Whatever it answers. Raises DriverTimeout, and EngineUnhealthy without a whole answer."""
        try:
            async with asyncio.timeout(max(self.left, 0.001)):
                return await exchange(self._address, method, path, payload)
        except TimeoutError:
            text = f"{method} {path} was not answered within {self.limit}"
            raise self.timeout(text) from None
        except Unreachable as error:
            raise self.failure(f"{method} {path}: {error}") from error

    async def sleeping(self) -> bool | None:
        """None: it does not say."""
        path = "/is_sleeping"
        reply = await self.request("GET", path)
        if reply.status in (404, 405):
            return None
        if reply.status != 200:
            raise self.bad_answer(path, reply)
        try:
            return bool(reply.json()["is_sleeping"])
        except (ValueError, LookupError, TypeError) as error:
            raise self.bad_answer(path, reply) from error


class VllmEngine:
    """Engine on vLLM's API. Stateless: may be used for any number of engines at once.

    ``retry_pauses``: seconds before each further try of an order that failed.
    """

    def __init__(self, retry_pauses: Sequence[float] = RETRY_PAUSES) -> None:
        self._retry_pauses = retry_pauses

    async def healthy(self, address: Address, deadline: float) -> bool:
        try:
            async with asyncio.timeout(deadline):
                return (await exchange(address, "GET", "/health", None)).status == 200
        except (TimeoutError, Unreachable):
            return False

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        operation = _Operation("wait for", address, deadline)
        pause = FIRST_PAUSE
        last = "nobody listens"
        with _Appearance(address.uds) as appearance:
            while True:
                appearance.clear()
                limit = min(operation.left, PROBE_TIMEOUT)
                if limit <= 0:
                    text = f"/health did not say 200 within {operation.limit} (last: {last})"
                    raise operation.timeout(text)
                try:
                    async with asyncio.timeout(limit):
                        reply = await exchange(address, "GET", "/health", None)
                except TimeoutError:
                    last = f"no answer within {limit:g}s"
                except Unreachable as error:
                    last = str(error)
                else:
                    if reply.status == 200:
                        return
                    last = f"{reply.status} {reply.excerpt}"
                await appearance.wait(min(pause, max(operation.left, 0)))
                pause = min(pause * 1.5, LAST_PAUSE)

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        operation = _Operation("put to sleep", address, deadline)
        await self._order(operation, "/sleep?" + urlencode({"level": level, "mode": "wait"}))
        await _await_sleeping(operation, True)

    async def wake(self, address: Address, tags: Sequence[str], deadline: float) -> None:
        operation = _Operation("wake", address, deadline)
        query = "?" + urlencode([("tags", tag) for tag in tags]) if tags else ""
        await self._order(operation, f"/wake_up{query}")
        if not tags:
            # After a partial wake it still says true.
            await _await_sleeping(operation, False)

    async def reload_weights(self, address: Address, deadline: float) -> None:
        operation = _Operation("reload the weights of", address, deadline)
        await self._order(operation, "/collective_rpc", {"method": "reload_weights"})

    async def communicators(self, address: Address, *, up: bool, deadline: float) -> None:
        name = "restore the communicators of" if up else "suspend the communicators of"
        operation = _Operation(name, address, deadline)
        last: EngineUnhealthy | None = None
        for method in COMMUNICATOR_HOOKS[up]:
            try:
                await self._order(operation, "/collective_rpc", {"method": method})
            except EngineUnhealthy as error:
                last = error  # this version may know the next one
            else:
                return
        raise operation.failure(
            f"it knows neither of {', '.join(COMMUNICATOR_HOOKS[up])}",
            hint="park a tensor-parallel model with keep_running or stop instead",
        ) from last

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None:
        operation = _Operation("reset the prefix cache of", address, deadline)
        await self._order(operation, "/reset_prefix_cache")

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        return await _Operation("ask", address, deadline).sleeping()

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        operation = _Operation("test", address, deadline)
        payload: dict[str, Any] = {
            "model": model,
            "prompt": CANARY_PROMPT,
            "max_tokens": CANARY_TOKENS,
            "temperature": 0,
            "seed": 0,
            "logprobs": 1,
        }
        path = "/v1/completions"
        reply = await operation.request("POST", path, payload)
        if reply.status == 400 and b"logprobs" in reply.body:
            del payload["logprobs"]
            reply = await operation.request("POST", path, payload)
        if reply.status in (400, 404, 501) and _lacks_completions(reply):
            return await _embedding_canary(operation, model)
        if reply.status != 200:
            raise operation.bad_answer(path, reply)
        try:
            choice = reply.json()["choices"][0]
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
            return Canary(str(choice["text"]), tuple(float(p) for p in logprobs if p is not None))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise operation.bad_answer(path, reply) from error

    async def describe(self, address: Address, deadline: float) -> Mapping[str, Any]:
        operation = _Operation("describe", address, deadline)

        async def get(path: str) -> Any:
            reply = await operation.request("GET", path)
            with suppress(ValueError):
                return reply.json() if reply.status == 200 else None
            return None

        version, models, api = await asyncio.gather(
            get("/version"), get("/v1/models"), get("/openapi.json")
        )
        found: dict[str, Any] = {"version": None, "max_model_len": None, "paths": []}
        with suppress(LookupError, TypeError):
            found["version"] = str(version["version"])
        with suppress(LookupError, TypeError, ValueError):
            found["max_model_len"] = int(models["data"][0]["max_model_len"])
        with suppress(LookupError, TypeError):
            found["paths"] = sorted(api["paths"])
        return found

    async def _order(
        self, operation: _Operation, path: str, payload: Mapping[str, Any] | None = None
    ) -> None:
        """POST until 2xx, with the retries as far as the deadline allows.

        All orders of the control API may be given twice. A refusal (4xx) is not repeated.
        """
        for pause in (*self._retry_pauses, None):
            failure: EngineUnhealthy
            try:
                reply = await operation.request("POST", path, payload)
            except EngineUnhealthy as error:
                failure = error
            else:
                if 200 <= reply.status < 300:
                    return
                failure = operation.bad_answer(path, reply)
                if reply.status < 500 and reply.status not in (408, 425, 429):
                    raise failure
            if pause is None or pause >= operation.left:
                raise failure
            await asyncio.sleep(pause)


async def _await_sleeping(operation: _Operation, want: bool) -> None:
    pause = FIRST_PAUSE
    contrary = False
    while True:
        try:
            sleeping = await operation.sleeping()
        except DriverTimeout:
            if not contrary:
                raise
            state = "awake" if want else "asleep"
            raise operation.timeout(f"still {state} after {operation.limit}") from None
        if sleeping is None or sleeping is want:
            return  # without /is_sleeping, the answer to the order has to do
        contrary = True
        await asyncio.sleep(min(pause, max(operation.left, 0)))
        pause = min(pause * 2, LAST_PAUSE)


async def _embedding_canary(operation: _Operation, model: str) -> Canary:
    """For a pooling model: the first numbers of an embedding stand for log-probs."""
    path = "/v1/embeddings"
    reply = await operation.request("POST", path, {"model": model, "input": CANARY_PROMPT})
    if reply.status != 200:
        raise operation.bad_answer(path, reply)
    try:
        vector = reply.json()["data"][0]["embedding"]
        return Canary("", tuple(float(x) for x in vector[:CANARY_TOKENS]))
    except (ValueError, LookupError, TypeError) as error:
        raise operation.bad_answer(path, reply) from error


class _Appearance:
    """Wakes up early when something appears beside a unix socket's path: the engine binds it."""

    def __init__(self, uds: str | None) -> None:
        self._uds = uds
        self._event = asyncio.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Appearance:
        if self._uds is not None:
            # No watch (too many instances, no directory yet) only means a later look.
            with suppress(OSError):
                inotify = self._stack.enter_context(contextlib.closing(Inotify()))
                mask = Mask.CREATE | Mask.MOVED_TO | Mask.ATTRIB
                inotify.watch(os.path.dirname(self._uds), mask, lambda *_: self._event.set())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def clear(self) -> None:
        self._event.clear()

    async def wait(self, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._event.wait()


def _lacks_completions(reply: Reply) -> bool:
    """True for "no such route" and "model does not support"; false for "no such model"."""
    try:
        body = reply.json()
    except ValueError:
        return False
    if not isinstance(body, dict):
        return False
    if body.get("detail") == "Not Found":
        return True
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else body.get("message")
    return "does not support" in str(message)
