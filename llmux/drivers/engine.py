"""vLLM's HTTP control API, over its unix socket or 127.0.0.1.

One connection per call and ``Connection: close``: none may be open while CRIU dumps the engine.
HTTP is parsed by httptools, which Sanic brings along; there is no HTTP client library. Only
requests that llmux itself makes go this way; clients' requests go straight from the gateway to the
engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

import httptools

from llmux.drivers.inotify import Inotify, Mask
from llmux.errors import DriverTimeout, EngineUnhealthy
from llmux.ports import Canary
from llmux.protocol import Address

BODY_CAP: Final = 16 * 1024 * 1024  # vLLM's openapi.json has about 0.3 MB
EXCERPT: Final = 500  # characters of an error body that go into a message
# What vLLM does after a failed wake is worth two more tries, half a second and a second later; a
# third never helped (two years of reports on the earlier program).
# Worker methods by which an engine takes its communicators down and sets them up again: vLLM's own
# since 0.32, and those of the patches that were used before.
COMMUNICATOR_HOOKS: Final = {
    False: ("checkpoint_prepare", "suspend_nccl"),
    True: ("checkpoint_restore", "resume_nccl"),
}
RETRY_PAUSES: Final = (0.5, 1.0)
PROBE_TIMEOUT: Final = 5.0  # one /health: a busy API server answers late, a hung one never
FIRST_PAUSE: Final = 0.005
LAST_PAUSE: Final = 0.25
CANARY_PROMPT: Final = "The capital of France is"
CANARY_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def excerpt(self) -> str:
        text = " ".join(self.body.decode(errors="replace").split())
        return text[:EXCERPT] + ("…" if len(text) > EXCERPT else "")


class _Unreachable(Exception):
    """No whole answer: refused, reset, no such socket, or not HTTP."""


class _Response:
    """httptools' callbacks. Old versions (0.1.1) want every one of them tolerated as absent."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False
        self.framed = False  # a length or chunks say where the body ends; else the connection does

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self.framed = True

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > BODY_CAP:
            raise ValueError(f"the answer is longer than {BODY_CAP} bytes")

    def on_message_complete(self) -> None:
        self.complete = True


@asynccontextmanager
async def _connection(
    address: Address,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    if address.uds is not None:
        reader, writer = await asyncio.open_unix_connection(address.uds)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    try:
        yield reader, writer
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        # Closed when we return, not some time later: a dump may come next.
        with suppress(OSError, asyncio.TimeoutError):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()


async def _exchange(
    address: Address, method: str, target: str, payload: Mapping[str, Any] | None
) -> _Reply:
    """One request and its whole answer. Raises _Unreachable."""
    body = b"" if payload is None else json.dumps(payload).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: */*\r\n"
    if method != "GET":
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    try:
        async with _connection(address) as (reader, writer):
            writer.write(head.encode() + b"\r\n" + body)
            while not response.complete:
                data = await reader.read(65536)
                if not data:
                    break
                parser.feed_data(data)
            status = parser.get_status_code()
    except (OSError, httptools.HttpParserError, ValueError) as error:
        raise _Unreachable(str(error) or type(error).__name__) from error
    if not response.complete and (response.framed or status == 0):
        raise _Unreachable("the connection was closed in the middle of the answer")
    return _Reply(status, bytes(response.body))


class VllmEngine:
    """Engine on vLLM's API. Stateless: may be used for any number of engines at once."""

    async def healthy(self, address: Address, deadline: float) -> bool:
        try:
            async with asyncio.timeout(deadline):
                return (await _exchange(address, "GET", "/health", None)).status == 200
        except (TimeoutError, _Unreachable):
            return False

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        end = time.monotonic() + deadline
        pause = FIRST_PAUSE
        last = "nobody listens"
        with _Appearance(address.uds) as appearance:
            while True:
                appearance.clear()
                left = end - time.monotonic()
                if left <= 0:
                    raise DriverTimeout(
                        "wait for",
                        f"the engine at {address}",
                        f"/health did not say 200 within {deadline:g}s (last: {last})",
                    )
                try:
                    async with asyncio.timeout(min(left, PROBE_TIMEOUT)):
                        reply = await _exchange(address, "GET", "/health", None)
                except TimeoutError:
                    last = f"no answer within {min(left, PROBE_TIMEOUT):g}s"
                except _Unreachable as error:
                    last = str(error)
                else:
                    if reply.status == 200:
                        return
                    last = f"{reply.status} {reply.excerpt}"
                await appearance.wait(min(pause, max(end - time.monotonic(), 0)))
                pause = min(pause * 1.5, LAST_PAUSE)

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        end = time.monotonic() + deadline
        query = urlencode({"level": level, "mode": "wait"})
        await self._order(address, "put to sleep", f"/sleep?{query}", None, end, deadline)
        await self._await_sleeping(address, "put to sleep", True, end, deadline)

    async def wake(self, address: Address, tags: Sequence[str], deadline: float) -> None:
        end = time.monotonic() + deadline
        query = "?" + urlencode([("tags", tag) for tag in tags]) if tags else ""
        await self._order(address, "wake", f"/wake_up{query}", None, end, deadline)
        if not tags:
            # After a partial wake it still says true.
            await self._await_sleeping(address, "wake", False, end, deadline)

    async def reload_weights(self, address: Address, deadline: float) -> None:
        end = time.monotonic() + deadline
        payload = {"method": "reload_weights"}
        await self._order(
            address, "reload the weights of", "/collective_rpc", payload, end, deadline
        )

    async def communicators(self, address: Address, *, up: bool, deadline: float) -> None:
        end = time.monotonic() + deadline
        operation = "restore the communicators of" if up else "suspend the communicators of"
        last: EngineUnhealthy | None = None
        for method in COMMUNICATOR_HOOKS[up]:
            try:
                payload = {"method": method}
                await self._order(address, operation, "/collective_rpc", payload, end, deadline)
            except EngineUnhealthy as error:
                last = error  # this version may know the next one
            else:
                return
        raise EngineUnhealthy(
            operation,
            f"the engine at {address}",
            f"it knows neither of {', '.join(COMMUNICATOR_HOOKS[up])}",
            hint="park a tensor-parallel model with keep_running or stop instead",
        ) from last

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None:
        end = time.monotonic() + deadline
        await self._order(
            address, "reset the prefix cache of", "/reset_prefix_cache", None, end, deadline
        )

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        end = time.monotonic() + deadline
        reply = await self._try(address, "ask", "GET", "/is_sleeping", None, end, deadline)
        if reply.status in (404, 405):
            return None
        if reply.status != 200:
            raise _bad_answer("ask", address, "/is_sleeping", reply)
        return _is_sleeping(address, reply)

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        end = time.monotonic() + deadline
        payload: dict[str, Any] = {
            "model": model,
            "prompt": CANARY_PROMPT,
            "max_tokens": CANARY_TOKENS,
            "temperature": 0,
            "seed": 0,
            "logprobs": 1,
        }
        path = "/v1/completions"
        reply = await self._try(address, "test", "POST", path, payload, end, deadline)
        if reply.status == 400 and b"logprobs" in reply.body:
            del payload["logprobs"]
            reply = await self._try(address, "test", "POST", path, payload, end, deadline)
        if reply.status in (400, 404, 501) and _lacks_completions(reply):
            return await self._embedding_canary(address, model, end, deadline)
        if reply.status != 200:
            raise _bad_answer("test", address, path, reply)
        try:
            choice = reply.json()["choices"][0]
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
            return Canary(str(choice["text"]), tuple(float(p) for p in logprobs if p is not None))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _bad_answer("test", address, path, reply) from error

    async def describe(self, address: Address, deadline: float) -> Mapping[str, Any]:
        end = time.monotonic() + deadline

        async def get(path: str) -> Any:
            reply = await self._try(address, "describe", "GET", path, None, end, deadline)
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

    async def _embedding_canary(
        self, address: Address, model: str, end: float, deadline: float
    ) -> Canary:
        """For a pooling model: the first numbers of an embedding stand for log-probs."""
        payload = {"model": model, "input": CANARY_PROMPT}
        path = "/v1/embeddings"
        reply = await self._try(address, "test", "POST", path, payload, end, deadline)
        if reply.status != 200:
            raise _bad_answer("test", address, path, reply)
        try:
            vector = reply.json()["data"][0]["embedding"]
            return Canary("", tuple(float(x) for x in vector[:CANARY_TOKENS]))
        except (ValueError, LookupError, TypeError) as error:
            raise _bad_answer("test", address, path, reply) from error

    async def _await_sleeping(
        self, address: Address, operation: str, want: bool, end: float, deadline: float
    ) -> None:
        pause = FIRST_PAUSE
        contrary = False
        while True:
            try:
                reply = await self._try(
                    address, operation, "GET", "/is_sleeping", None, end, deadline
                )
            except DriverTimeout:
                if not contrary:
                    raise
                state = "awake" if want else "asleep"
                raise DriverTimeout(
                    operation, f"the engine at {address}", f"still {state} after {deadline:g}s"
                ) from None
            if reply.status in (404, 405):
                return  # nothing to observe by; the answer to the order has to do
            if reply.status != 200:
                raise _bad_answer(operation, address, "/is_sleeping", reply)
            if _is_sleeping(address, reply) is want:
                return
            contrary = True
            await asyncio.sleep(min(pause, max(end - time.monotonic(), 0)))
            pause = min(pause * 2, LAST_PAUSE)

    async def _order(
        self,
        address: Address,
        operation: str,
        path: str,
        payload: Mapping[str, Any] | None,
        end: float,
        deadline: float,
    ) -> None:
        """POST until 2xx, with the retries of RETRY_PAUSES as far as the deadline allows.

        All orders of the control API may be given twice. A refusal (4xx) is not repeated.
        """
        for pause in (*RETRY_PAUSES, None):
            failure: EngineUnhealthy
            try:
                reply = await self._try(address, operation, "POST", path, payload, end, deadline)
            except EngineUnhealthy as error:
                failure = error
            else:
                if 200 <= reply.status < 300:
                    return
                failure = _bad_answer(operation, address, path, reply)
                if reply.status < 500 and reply.status not in (408, 425, 429):
                    raise failure
            if pause is None or time.monotonic() + pause >= end:
                raise failure
            await asyncio.sleep(pause)

    async def _try(
        self,
        address: Address,
        operation: str,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        end: float,
        deadline: float,
    ) -> _Reply:
        target = f"the engine at {address}"
        try:
            async with asyncio.timeout(max(end - time.monotonic(), 0.001)):
                return await _exchange(address, method, path, payload)
        except TimeoutError:
            raise DriverTimeout(
                operation, target, f"{method} {path} was not answered within {deadline:g}s"
            ) from None
        except _Unreachable as error:
            raise EngineUnhealthy(operation, target, f"{method} {path}: {error}") from error


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


def _bad_answer(operation: str, address: Address, path: str, reply: _Reply) -> EngineUnhealthy:
    hint = None
    if reply.status in (404, 405):
        hint = "is VLLM_SERVER_DEV_MODE=1 in its environment, and this vLLM recent enough?"
    return EngineUnhealthy(
        operation,
        f"the engine at {address}",
        f"{path} answered {reply.status}: {reply.excerpt or '(no body)'}",
        hint=hint,
        status=reply.status,
    )


def _is_sleeping(address: Address, reply: _Reply) -> bool:
    try:
        return bool(reply.json()["is_sleeping"])
    except (ValueError, LookupError, TypeError) as error:
        raise _bad_answer("ask", address, "/is_sleeping", reply) from error


def _lacks_completions(reply: _Reply) -> bool:
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
