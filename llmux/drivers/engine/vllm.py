"""vLLM's HTTP control API: health, sleep and wake, workers' methods, the canary.

Only requests that llmux itself makes go this way; clients' requests go straight from the gateway to
the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlencode

from llmux.drivers.engine.counters import work_counters
from llmux.drivers.engine.http import Reply, Unreachable, exchange
from llmux.drivers.processes.inotify import Inotify, Mask
from llmux.engines.canaries import Probe, encode, fits
from llmux.engines.vllm import VLLM
from llmux.errors import DriverTimeout, EngineUnhealthy
from llmux.ports import Canary, Vitals
from llmux.printable import clean
from llmux.protocol import Address
from llmux.typed_json import LARGEST_INT

log = logging.getLogger("llmux")

# Seconds. A failed wake is worth two more tries; a third never helped (two years of reports on the
# earlier program).
RETRY_PAUSES: Final = (0.5, 1.0)
PROBE_TIMEOUT: Final = 5.0  # one /health; a busy API server answers late
FIRST_PAUSE: Final = 0.005
LAST_PAUSE: Final = 0.25
LONGEST_VERSION: Final = 100
KV_CACHE: Final = {"tags": ["kv_cache"]}
# What reading an answer of another shape raises; a number may be too large for a float or an int.
ODD: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


class _Operation:
    """One operation on one engine: the subject of its errors, and the deadline of its requests.
    ``name`` completes "cannot … the engine at …"."""

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
            hint = VLLM.control_hint
        text = f"{path} answered {reply.status}: {reply.excerpt or '(no body)'}"
        return self.failure(text, hint=hint, status=reply.status)

    async def request(
        self, method: str, path: str, payload: Mapping[str, Any] | bytes | None = None
    ) -> Reply:
        """Return the answer, whatever its status. Raises DriverTimeout, and EngineUnhealthy without
        a complete answer."""
        try:
            async with asyncio.timeout(max(self.left, 0.001)):
                if payload is None:
                    return await exchange(self._address, method, path)
                return await exchange(self._address, method, path, *encode(payload))
        except TimeoutError:
            text = f"{method} {path} was not answered within {self.limit}"
            raise self.timeout(text) from None
        except Unreachable as error:
            raise self.failure(f"{method} {path}: {error}") from error

    async def sleeping(self) -> bool | None:
        """None when the engine has no such endpoint."""
        path = "/is_sleeping"
        reply = await self.request("GET", path)
        if reply.status in (404, 405):
            return None
        if reply.status != 200:
            raise self.bad_answer(path, reply)
        try:
            asleep = reply.json()["is_sleeping"]
        except ODD as error:
            raise self.bad_answer(path, reply) from error
        if not isinstance(asleep, bool):
            raise self.bad_answer(path, reply)
        return asleep


class VllmEngine:
    """Engine port on vLLM's API. Stateless: one instance serves any number of engines.

    ``retry_pauses``: seconds before each further try of an order that failed.
    """

    def __init__(self, retry_pauses: Sequence[float] = RETRY_PAUSES) -> None:
        self._retry_pauses = retry_pauses

    async def healthy(self, address: Address, deadline: float) -> bool:
        try:
            async with asyncio.timeout(deadline):
                return (await exchange(address, "GET", "/health")).status == 200
        except (TimeoutError, Unreachable):
            return False

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        operation = _Operation("wait for", address, deadline)
        pause = FIRST_PAUSE
        last, answered = "no process listens", False
        with _Appearance(address.uds) as appearance:
            while True:
                appearance.clear()
                limit = min(operation.left, PROBE_TIMEOUT)
                if limit <= 0:
                    text = f"/health did not say 200 within {operation.limit} (last: {last})"
                    raise operation.timeout(text)
                try:
                    async with asyncio.timeout(limit):
                        reply = await exchange(address, "GET", "/health")
                except TimeoutError:
                    # One that the end of the wait cuts short says less than the answer before it.
                    if limit >= PROBE_TIMEOUT or not answered:
                        last, answered = f"no answer within {limit:g}s", False
                except Unreachable as error:
                    last = str(error)
                else:
                    if reply.status == 200:
                        return
                    last, answered = f"{reply.status} {reply.excerpt}", True
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
        methods = VLLM.communicators_up if up else VLLM.communicators_down
        last: EngineUnhealthy | None = None
        for method in methods:
            try:
                await self._order(operation, "/collective_rpc", {"method": method})
            except EngineUnhealthy as error:
                last = error  # this version may know the next one
            else:
                return
        raise operation.failure(
            f"it knows neither of {', '.join(methods)}",
            hint="park a tensor-parallel model with keep_running or stop instead",
        ) from last

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None:
        operation = _Operation("reset the prefix cache of", address, deadline)
        path = "/reset_prefix_cache"
        reply = await self._order(operation, path)
        with suppress(*ODD):  # versions before 0.15 answer nothing
            if reply.json()["success"] is False:
                raise operation.bad_answer(path, reply)

    async def discard_cache(self, address: Address, deadline: float) -> None:
        operation = _Operation("discard the KV cache of", address, deadline)
        await self._order(operation, "/collective_rpc", {"method": "discard", "kwargs": KV_CACHE})

    async def return_cache(self, address: Address, deadline: float) -> None:
        # Not /wake_up: what workers discarded by a call of theirs, the engine does not count as
        # asleep, and it would do nothing (vLLM 0.32).
        operation = _Operation("return the KV cache of", address, deadline)
        await self._order(operation, "/collective_rpc", {"method": "wake_up", "kwargs": KV_CACHE})

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        return await _Operation("ask", address, deadline).sleeping()

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        operation = _Operation("test", address, deadline)
        found = await _first_answer(operation, VLLM.canaries, model)
        if found is not None:
            return found
        log.warning(
            "no canary fits %s: it serves none of %s; its wakes are not compared",
            model,
            ", ".join(probe.path for probe in VLLM.canaries),
            extra={"model": model},
        )
        return Canary("")

    async def sample(self, address: Address, model: str, deadline: float) -> None:
        await _first_answer(_Operation("sample", address, deadline), VLLM.sampled, model)

    async def vitals(self, address: Address, deadline: float) -> Vitals:
        """Both are asked side by side: what one of them does takes nothing from the other."""

        async def get(path: str) -> Reply | None:
            with suppress(TimeoutError, Unreachable):
                async with asyncio.timeout(deadline):
                    return await exchange(address, "GET", path)
            return None

        health, metrics = await asyncio.gather(get("/health"), get("/metrics"))
        status = health.status if health else None
        if metrics is None or metrics.status >= 500:
            return Vitals(status)
        if status is None:
            status = metrics.status  # any answer is one
        if metrics.status != 200:
            return Vitals(status)
        return Vitals(status, *work_counters(metrics.body, VLLM))

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
        with suppress(*ODD):
            found["version"] = clean(str(version["version"]))[:LONGEST_VERSION]
        with suppress(*ODD):
            length = models["data"][0]["max_model_len"]
            if type(length) is int and 0 < length <= LARGEST_INT:
                found["max_model_len"] = length
        with suppress(*ODD):
            found["paths"] = sorted(api["paths"])
        return found

    async def _order(
        self, operation: _Operation, path: str, payload: Mapping[str, Any] | None = None
    ) -> Reply:
        """POST until 2xx, with retries as far as the deadline allows; that answer.

        All orders of the control API are idempotent. A refusal (4xx) is not repeated.
        """
        for pause in (*self._retry_pauses, None):
            failure: EngineUnhealthy
            try:
                reply = await operation.request("POST", path, payload)
            except EngineUnhealthy as error:
                failure = error
            else:
                if 200 <= reply.status < 300:
                    return reply
                failure = operation.bad_answer(path, reply)
                if reply.status < 500 and reply.status not in (408, 425, 429):
                    raise failure
            if pause is None or pause >= operation.left:
                raise failure
            await asyncio.sleep(pause)
        raise AssertionError("the last pause is None")


async def _await_sleeping(operation: _Operation, want: bool) -> None:
    pause = FIRST_PAUSE
    contrary = False
    while True:
        try:
            sleeping = await operation.sleeping()
        except DriverTimeout:
            if not contrary:
                raise
            sleeping = not want
        if sleeping is None or sleeping is want:
            return  # without /is_sleeping, rely on the order's answer
        if operation.left <= 0:
            state = "awake" if want else "asleep"
            raise operation.timeout(f"still {state} after {operation.limit}")
        contrary = True
        await asyncio.sleep(min(pause, max(operation.left, 0)))
        pause = min(pause * 2, LAST_PAUSE)


async def _first_answer(
    operation: _Operation, probes: Iterable[Probe], model: str
) -> Canary | None:
    """The answer to the first request that the engine serves; None when it serves none."""
    for probe in probes:
        reply = await _ask(operation, probe, model)
        if not fits(reply.status, reply.body):
            continue
        if reply.status != 200:
            raise operation.bad_answer(probe.path, reply)
        try:
            return Canary(*probe.read(reply.json()))
        except ODD as error:
            raise operation.bad_answer(probe.path, reply) from error
    return None


async def _ask(operation: _Operation, probe: Probe, model: str) -> Reply:
    body = probe.body(model)
    reply = await operation.request("POST", probe.path, body)
    optional = probe.optional
    if reply.status == 400 and optional and optional.encode() in reply.body:
        assert isinstance(body, Mapping)
        rest = {name: value for name, value in body.items() if name != optional}
        reply = await operation.request("POST", probe.path, rest)
    return reply


class _Appearance:
    """Wait for a unix socket to be bound: end a pause early when a file appears beside it."""

    def __init__(self, uds: str | None) -> None:
        self._uds = uds
        self._event = asyncio.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Appearance:
        if self._uds is not None:
            # Without a watch (too many instances, no directory yet) the pause just runs its length.
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
