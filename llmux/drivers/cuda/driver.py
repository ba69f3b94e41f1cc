"""CUDA checkpoints through the driver API, by a resident helper process (``cuda_helper.py``).

Owns the helpers. The current one gets the calls; one that has let a call run past its deadline is
retired: it is given nothing new (a hung call may hold a lock inside the driver), a fresh helper
takes over, and the retired one leaves by itself when its last call has ended. Helpers are never
killed: a call cut short can put the target out of step with the driver for good (criu#2547).
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmux.drivers.cuda.calls import (
    CudaCallError,
    CudaCallTimeout,
    call_environment,
    spawn,
)
from llmux.drivers.cuda.sequence import CudaSequence
from llmux.errors import Unsupported

log = logging.getLogger(__name__)

HELPER = Path(__file__).with_name("cuda_helper.py")
LIBRARY = "libcuda.so.1"
OLDEST_DRIVER = (
    "570"  # first with the checkpoint functions (cuda.h 12.8) and with NVML users covered
)
START_SECS = 60.0  # cuInit: 2.7 s on 8 x H100, more without persistence mode
CLOSE_SECS = 2.0  # an idle helper leaves in milliseconds; a busy one is left to finish
LINE_LIMIT = 1 << 16


def greeting_problem(greeting: Mapping[str, Any], library: str) -> tuple[str, str] | None:
    """(Problem, remedy) when a helper with this greeting cannot be used, else None."""
    remedy = f"install an NVIDIA driver >= {OLDEST_DRIVER}, or set checkpoint.cuda_checkpoint_path"
    if greeting.get("problem"):
        return str(greeting["problem"]), remedy
    missing = greeting.get("missing") or []
    if missing:
        version = int(greeting.get("driver_version") or 0)
        api = (
            f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "unknown CUDA version"
        )
        return f"{library} ({api}) lacks {', '.join(missing)}", remedy
    if greeting.get("code"):
        return (
            f"cuInit of {library} failed: {greeting.get('text')} ({greeting.get('name')})",
            "look at `nvidia-smi` and at `journalctl -k` for NVRM",
        )
    return None


class Helper:
    """One helper process and the calls that are out."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._next_id = 0
        self._out: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None
        self.greeting: Mapping[str, Any] = {}
        self.alive = True

    @classmethod
    async def start(cls, library: str, env: Mapping[str, str]) -> Helper:
        """Start a helper; returns once its greeting, good or bad, has come."""
        argv = [sys.executable, "-I", str(HELPER), "--library", library]
        process, ours = spawn(argv, env, requests=True)
        helper = cls(process, *await asyncio.open_connection(sock=ours, limit=LINE_LIMIT))
        try:
            await helper._greet()
        except BaseException:  # cancelled while the helper is inside cuInit: not killed
            helper._writer.close()
            raise
        helper._reading = asyncio.create_task(helper._read())
        return helper

    async def _greet(self) -> None:
        try:
            async with asyncio.timeout(START_SECS):
                self.greeting = json.loads(await self._reader.readline())
        except TimeoutError:
            self.greeting = {"problem": f"the CUDA helper said nothing for {START_SECS:.0f} s"}
        except ValueError:
            self.greeting = {"problem": "the CUDA helper ended without a word"}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Seen to have ended, and reaped."""
        return self._reading is None or self._reading.done()

    async def _read(self) -> None:
        # One that ended with requests of ours unread resets the connection, or takes no more.
        with suppress(ConnectionError):
            while line := await self._reader.readline():
                answer = json.loads(line)
                future = self._out.pop(answer["id"], None)
                if future is not None and not future.done():
                    future.set_result(answer)
        self.alive = False
        self._writer.close()
        # Its end of the socket is closed: it has ended or is about to. "About" is why a thread.
        status = await asyncio.to_thread(self._process.wait)
        for future in self._out.values():
            if not future.done():
                future.set_exception(EOFError(f"the CUDA helper ended (status {status})"))
        self._out.clear()

    def send(self, operation: str, pid: int, lock_ms: int) -> asyncio.Future[dict[str, Any]]:
        """The answer to come; EOFError when the helper ends before it."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._next_id += 1
        request = {"id": self._next_id, "op": operation, "pid": pid, "timeout_ms": lock_ms}
        if not self.alive:
            future.set_exception(EOFError("the CUDA helper has ended"))
            return future
        self._out[self._next_id] = future
        self._writer.write(json.dumps(request).encode() + b"\n")
        return future

    def retire(self) -> None:
        """Nothing new; it leaves by itself when the last call has ended."""
        if self.alive and not self._writer.is_closing():
            self._writer.write_eof()

    async def leave(self, seconds: float) -> bool:
        """True when it has gone within that time; else it finishes its calls by itself."""
        self.retire()
        assert self._reading is not None
        done, _ = await asyncio.wait([self._reading], timeout=seconds)
        if not done:
            self._reading.cancel()
            self._writer.close()
        return bool(done)


class HelperCalls:
    """``CudaCalls`` through helpers: one current at most, retired ones kept until they end."""

    def __init__(
        self,
        library: str = LIBRARY,
        env: Mapping[str, str] | None = None,
        close_secs: float = CLOSE_SECS,
    ) -> None:
        self._library = library
        self._close_secs = close_secs
        self._env = call_environment(env)
        self._current: Helper | None = None
        self._retired: list[Helper] = []
        self._starting = asyncio.Lock()  # two calls at once must not start two helpers

    async def ready(self) -> None:
        await self._helper()

    async def _helper(self) -> Helper:
        async with self._starting:
            self._retired = [helper for helper in self._retired if not helper.ended]
            if self._current is not None:
                if self._current.alive:
                    return self._current
                self._retired.append(self._current)
                self._current = None
            helper = await Helper.start(self._library, self._env)
            problem = greeting_problem(helper.greeting, self._library)
            if problem is not None:
                helper.retire()
                self._retired.append(helper)
                raise Unsupported(
                    "checkpoint CUDA state through", self._library, problem[0], hint=problem[1]
                )
            log.debug("CUDA helper %d is ready, driver API %s", helper.pid, helper.greeting)
            self._current = helper
            return helper

    async def call(
        self,
        operation: str,
        pid: int,
        timeout: float,
        *,
        on_late: Callable[[], None],
        lock_ms: int = 0,
    ) -> int:
        try:
            helper = await self._helper()
        except Unsupported as error:
            raise CudaCallError(operation, pid, None, str(error)) from error
        future = helper.send(operation, pid, lock_ms)
        try:
            # wait, not wait_for: the call cannot be cancelled, so its future must not be either.
            done, _ = await asyncio.wait([future], timeout=timeout)
        except asyncio.CancelledError:
            self._let_go(helper, future, on_late)
            raise
        if not done:
            self._let_go(helper, future, on_late)
            raise CudaCallTimeout(operation, pid)
        return self._value(operation, pid, future)

    def _let_go(
        self,
        helper: Helper,
        future: asyncio.Future[dict[str, Any]],
        on_late: Callable[[], None],
    ) -> None:
        """Stop waiting for this call and retire its helper."""

        def ended(late: asyncio.Future[dict[str, Any]]) -> None:
            late.exception()  # retrieved, so that asyncio does not log it
            on_late()

        future.add_done_callback(ended)
        helper.retire()
        if helper is self._current:
            self._current = None
            self._retired.append(helper)

    @staticmethod
    def _value(operation: str, pid: int, future: asyncio.Future[dict[str, Any]]) -> int:
        try:
            answer = future.result()
        except EOFError as error:
            words = f"{error} during the call; the process may be out of step with the driver"
            raise CudaCallError(operation, pid, None, words) from error
        code = int(answer["code"])
        if code != 0:
            words = f"{answer.get('text')} ({answer.get('name')}, {code})"
            raise CudaCallError(operation, pid, code, words)
        return int(answer.get("value", 0))

    async def close(self) -> None:
        helpers = [*self._retired, *([self._current] if self._current else [])]
        self._retired, self._current = [], None
        left = await asyncio.gather(*(helper.leave(self._close_secs) for helper in helpers))
        for helper, gone in zip(helpers, left, strict=True):
            if not gone:
                log.warning("leaving CUDA helper %d to finish a call by itself", helper.pid)


class CudaDriver(CudaSequence):
    """``ports.DeviceCheckpointer`` on the driver API."""

    def __init__(
        self, library: str = LIBRARY, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(HelperCalls(library, env), **options)

    async def initialise(self) -> None:
        """CUDA is initialised, by a helper that stays. Raises Unsupported with what is wrong."""
        await self._calls.ready()
