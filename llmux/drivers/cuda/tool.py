"""CUDA checkpoints through NVIDIA's ``cuda-checkpoint`` tool: ``checkpoint.cuda_checkpoint_path``.

The alternative where the driver API cannot be used; costs a process and a cuInit for every call
(2.7 s each on an 8-GPU host). A call that runs past its deadline is left running: ended by a signal
it could leave the target out of step with the driver (criu#2547).

Options as of driver 555 to 570: ``--action lock|checkpoint|restore|unlock --pid P``, ``--timeout
MS`` for lock only, ``--get-state``, ``--get-restore-tid``. Exit status is the CUresult, modulo
256.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from llmux.drivers.cuda.calls import (
    Code,
    CudaCallError,
    CudaCallTimeout,
    CudaState,
    call_environment,
    spawn,
)
from llmux.drivers.cuda.sequence import CudaSequence
from llmux.errors import Unsupported

OUTPUT_LIMIT = 4096
NO_CUDA = "Could not find restore thread"  # said of any process without CUDA; not an error for us
# The exit status has 8 bits, CUresult needs 10: the text decides. Texts are cuGetErrorString's.
CODES: Mapping[str, int] = {
    NO_CUDA: Code.INVALID_VALUE,
    "invalid argument": Code.INVALID_VALUE,
    "out of memory": Code.OUT_OF_MEMORY,
    "initialization error": Code.NOT_INITIALIZED,
    "OS call failed": Code.OPERATING_SYSTEM,
    "device not ready": Code.NOT_READY,
    "operation not permitted": Code.NOT_PERMITTED,
    "operation not supported": Code.NOT_SUPPORTED,
    "illegal state": Code.ILLEGAL_STATE,
}


def arguments(operation: str, pid: int, lock_ms: int) -> list[str]:
    """The tool's arguments for one of our operations."""
    if operation == "restore_tid":
        return ["--get-restore-tid", "--pid", str(pid)]
    if operation == "state":
        return ["--get-state", "--pid", str(pid)]
    timeout = ["--timeout", str(lock_ms)] if operation == "lock" else []
    return ["--action", operation, "--pid", str(pid), *timeout]


def parse_answer(operation: str, pid: int, status: int, output: str) -> int:
    """The value the tool printed. Raises CudaCallError with its words otherwise."""
    text = " ".join(output.split())[:300]
    if status != 0:
        words = text or "no message"
        code = next((code for part, code in CODES.items() if part in text), status)
        raise CudaCallError(operation, pid, int(code), f"{words} (exit status {status})")
    if operation == "state":
        try:
            return CudaState[text.upper()]
        except KeyError:
            raise CudaCallError(operation, pid, None, f"unknown state {text!r}") from None
    if operation == "restore_tid":
        try:
            return int(text)
        except ValueError:
            raise CudaCallError(operation, pid, None, f"no thread id: {text!r}") from None
    return 0


class ToolCalls:
    """``CudaCalls`` by one run of the tool each."""

    def __init__(self, path: str, env: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._env = call_environment(env)
        self._late: set[asyncio.Task[int]] = set()

    async def ready(self) -> None:
        if shutil.which(self._path) is None:
            raise Unsupported(
                "checkpoint CUDA state through",
                self._path,
                "no such program, or not executable",
                hint="correct checkpoint.cuda_checkpoint_path, or leave it out: the driver API",
            )

    async def call(
        self,
        operation: str,
        pid: int,
        timeout: float,
        *,
        on_late: Callable[[], None],
        lock_ms: int = 0,
    ) -> int:
        task = asyncio.create_task(self._run(operation, pid, lock_ms))
        try:
            done, _ = await asyncio.wait([task], timeout=timeout)
        except asyncio.CancelledError:
            self._let_go(task, on_late)
            raise
        if not done:
            self._let_go(task, on_late)
            raise CudaCallTimeout(operation, pid)
        return task.result()

    def _let_go(self, task: asyncio.Task[int], on_late: Callable[[], None]) -> None:
        def ended(late: asyncio.Task[int]) -> None:
            self._late.discard(late)
            if not late.cancelled():  # only when the whole loop ends
                late.exception()
                on_late()

        self._late.add(task)
        task.add_done_callback(ended)

    async def _run(self, operation: str, pid: int, lock_ms: int) -> int:
        argv = [self._path, *arguments(operation, pid, lock_ms)]
        try:
            process, ours = spawn(argv, self._env, requests=False)
        except OSError as error:
            raise CudaCallError(operation, pid, None, f"cannot run {argv[0]}: {error}") from error
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            output = b""
            while part := await reader.read(OUTPUT_LIMIT):
                output = (output + part)[-OUTPUT_LIMIT:]
            status = await asyncio.to_thread(process.wait)
        finally:
            writer.close()
        if status < 0:
            words = f"{self._path} was killed by signal {-status} in mid-operation"
            raise CudaCallError(operation, pid, None, words)
        return parse_answer(operation, pid, status, output.decode(errors="replace"))

    async def close(self) -> None:
        """Runs that are still going on end by themselves."""
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)


class CudaCheckpointTool(CudaSequence):
    """``ports.DeviceCheckpointer`` on the ``cuda-checkpoint`` program at ``path``."""

    def __init__(self, path: str, *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(ToolCalls(path, env), **options)
