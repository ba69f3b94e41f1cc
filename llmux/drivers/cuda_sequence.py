"""The order in which a set of processes gives its GPUs up and takes them back.

Lock all, checkpoint all; restore all, unlock all; every state read back. The single calls come from
a ``CudaCalls``: drivers/cuda.py makes them through libcuda, drivers/cuda_cli.py through the
``cuda-checkpoint`` tool. State is always asked first, so doing a thing twice does not toggle it.

A call that outlives its deadline is never interrupted (criu#2547: the target can get out of step
with the driver). Its process is then *tainted*: no other call is made on it until the late answer
has come or the process has ended.

Order and undo: NVIDIA/cuda-checkpoint README; ai-dynamo/snapshot ``cuda.go`` for several processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from llmux.drivers import cuda_memory
from llmux.drivers.cuda_calls import (
    ADVICE,
    Code,
    CudaCallError,
    CudaCalls,
    CudaCallTimeout,
    CudaState,
    ProcessTable,
    expected,
    names,
)
from llmux.errors import CheckpointFailed, DriverTimeout

Failure = CudaCallError | CudaCallTimeout

LOCK_SECS = 30.0  # a drained engine has little submitted work left; CRIU's plugin gives it 10 s
UNDO_SECS = 15.0  # bound on putting things back; the next rung of the ladder is waiting for it


class CudaSequence:
    """``ports.DeviceCheckpointer`` on any CudaCalls.

    Invariant: at most one operation is in progress on a process, and none on a tainted one.
    """

    def __init__(
        self,
        calls: CudaCalls,
        *,
        processes: ProcessTable | None = None,
        memory: cuda_memory.HostMemory | None = None,
        lock_secs: float = LOCK_SECS,
        undo_secs: float = UNDO_SECS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = calls
        self._processes = processes or ProcessTable()
        self._memory = memory or cuda_memory.HostMemory()
        self._lock_secs = lock_secs
        self._undo_secs = undo_secs
        self._clock = clock
        self._tainted: dict[tuple[int, int], str] = {}  # (pid, start ticks) → operation still out

    # ---- the port -----------------------------------------------------------------------------

    async def suspend(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """All CUDA processes among ``pids`` checkpointed: seen so. Returns them, sorted.

        On failure everything that this call touched is running again, where that can be had. Those
        in FAILED, and those whose call is still out, are named in the error: kill the model.
        """
        end = await self._begin("suspend", pids, deadline)
        found = await self._observe("suspend", pids, end)
        self._refuse_failed("suspend", found)
        locked = [pid for pid, state in found.items() if state is CudaState.LOCKED]
        running = [pid for pid, state in found.items() if state is CudaState.RUNNING]
        touched = locked + running
        lock_secs = min(self._lock_secs, max(0.0, end - self._clock()) / 2)
        for operation, targets in (("lock", running), ("checkpoint", touched)):
            errors = await self._each(operation, targets, end, lock_secs)
            if errors:
                await self._fail_suspend(operation, touched, errors)
        errors = await self._wrong(found, CudaState.CHECKPOINTED, end)
        if errors:
            await self._fail_suspend("state", touched, errors)
        return sorted(found)

    async def resume(self, pids: Sequence[int], deadline: float) -> None:
        """All CUDA processes among ``pids`` running: seen so.

        When one cannot be restored none is unlocked: those restored stay locked, the others
        checkpointed, and a second resume goes on from there.
        """
        end = await self._begin("resume", pids, deadline)
        gone = [pid for pid in pids if self._processes.start_ticks(pid) is None]
        if gone:
            raise CheckpointFailed("resume", names(gone), "no such process", hint="stop the model")
        found = await self._observe("resume", pids, end)
        self._refuse_failed("resume", found)
        parked = [pid for pid, state in found.items() if state is CudaState.CHECKPOINTED]
        halted = [pid for pid, state in found.items() if state is not CudaState.RUNNING]
        for operation, targets in (("restore", parked), ("unlock", halted)):
            errors = await self._each(operation, targets, end)
            if errors:
                await self._fail_resume(operation, sorted(found), errors)
        errors = await self._wrong(found, CudaState.RUNNING, end)
        if errors:
            await self._fail_resume("state", sorted(found), errors)

    async def suspended(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """The CUDA processes among ``pids`` that are not running, sorted."""
        end = await self._begin("look at", pids, deadline)
        found = await self._observe("look at", pids, end)
        return sorted(pid for pid, state in found.items() if state is not CudaState.RUNNING)

    async def check_memory(self, pids: Sequence[int], gpu_used_bytes: int) -> None:
        """Refuses when host memory cannot take what these processes hold on the GPUs."""
        problem = self._memory.shortage(pids, gpu_used_bytes)
        if problem is not None:
            raise CheckpointFailed(
                "suspend",
                names(pids),
                problem,
                hint="park with weights: discard or offload, which give the KV cache back first, "
                "or lower --gpu-memory-utilization",
            )

    @staticmethod
    def required_host_bytes(gpu_used_bytes: int) -> int:
        return cuda_memory.required_host_bytes(gpu_used_bytes)

    async def close(self) -> None:
        """Lets go of helpers; one in mid-operation is left to finish."""
        await self._calls.close()

    async def _begin(self, verb: str, pids: Sequence[int], deadline: float) -> float:
        """When the operation has to be over; the driver is there (its start may take seconds)."""
        end = self._clock() + deadline
        try:
            async with asyncio.timeout(deadline):
                await self._calls.ready()
        except TimeoutError:
            raise DriverTimeout(
                verb,
                names(pids),
                f"the CUDA driver was not ready within {deadline:g}s; nothing was changed",
                hint="try `nvidia-smi`; persistence mode makes the driver's start quick",
            ) from None
        return end

    # ---- looking ------------------------------------------------------------------------------

    async def _observe(self, verb: str, pids: Sequence[int], end: float) -> dict[int, CudaState]:
        """The CUDA processes among ``pids`` and the state of each."""
        self._refuse_tainted(verb, pids)
        try:
            # By the restore thread, not by the state: coordinator processes without CUDA have a
            # state too (ai-dynamo/snapshot cuda.go).
            with_cuda = [
                pid
                for pid, has in zip(
                    pids,
                    await asyncio.gather(*(self._has_cuda(pid, end) for pid in pids)),
                    strict=True,
                )
                if has
            ]
            states = await asyncio.gather(*(self._state(pid, end) for pid in with_cuda))
        except CudaCallError as error:
            raise CheckpointFailed(
                verb, names(pids), str(error), hint=ADVICE.get(error.code or 0)
            ) from error
        except CudaCallTimeout as error:
            raise DriverTimeout(
                verb, names(pids), f"{error}; nothing was changed", hint="stop the model"
            ) from error
        return dict(zip(with_cuda, states, strict=True))

    async def _has_cuda(self, pid: int, end: float) -> bool:
        try:
            await self._call("restore_tid", pid, end)
        except CudaCallError as error:
            if error.code in (Code.INVALID_VALUE, Code.NOT_INITIALIZED):
                return False
            # Other codes are ambiguous (a process that ended meanwhile, one without CUDA under
            # another user): what the process maps decides.
            if error.code is not None and not self._processes.maps_gpu(pid):
                return False
            raise
        return True

    async def _state(self, pid: int, end: float) -> CudaState:
        value = await self._call("state", pid, end)
        try:
            return CudaState(value)
        except ValueError:
            raise CudaCallError("state", pid, None, f"unknown state {value}") from None

    async def _wrong(self, pids: Iterable[int], wanted: CudaState, end: float) -> list[Failure]:
        """Those that are not in the wanted state although every call said yes."""

        async def check(pid: int) -> int:
            state = await self._state(pid, end)
            if state is not wanted:
                words = f"the driver reported success, but it is {state.name.lower()}"
                raise CudaCallError("state", pid, None, words)
            return state

        results = await asyncio.gather(*(expected(check(pid)) for pid in pids))
        return [error for error in results if error is not None]

    # ---- acting -------------------------------------------------------------------------------

    async def _call(self, operation: str, pid: int, end: float, lock_secs: float = 0.0) -> int:
        """One call; on a timeout or cancellation the process stays tainted until it has ended."""
        left = end - self._clock()
        if left <= 0:
            raise CudaCallError(operation, pid, None, "the deadline passed before it was begun")
        key = (pid, self._processes.start_ticks(pid) or 0)

        def clear() -> None:
            self._tainted.pop(key, None)

        self._tainted[key] = operation
        try:
            result = await self._calls.call(
                operation,
                pid,
                left,
                on_late=clear,
                lock_ms=max(1, int(lock_secs * 1000)),
            )
        except CudaCallError:
            clear()
            raise
        clear()
        return result

    async def _each(
        self, operation: str, pids: Iterable[int], end: float, lock_secs: float = 0.0
    ) -> list[Failure]:
        """The call on all of them at once: ranks of one model wait for each other's GPU work."""
        results = await asyncio.gather(
            *(expected(self._call(operation, pid, end, lock_secs)) for pid in pids)
        )
        return [error for error in results if error is not None]

    async def _fail_suspend(
        self,
        operation: str,
        touched: Sequence[int],
        errors: Sequence[Failure],
    ) -> NoReturn:
        """Puts back what can be, then raises."""
        end = self._clock() + self._undo_secs
        out = {error.pid for error in errors if isinstance(error, CudaCallTimeout)}
        undone = await asyncio.gather(
            *(self._put_back(pid, end) for pid in touched if pid not in out)
        )
        self._raise("suspend", operation, touched, errors, [line for line in undone if line])

    async def _put_back(self, pid: int, end: float) -> str:
        """Running again, or the words that say why not."""
        try:
            state = await self._state(pid, end)
            if state is CudaState.CHECKPOINTED:
                await self._call("restore", pid, end)
                state = CudaState.LOCKED
            if state is CudaState.LOCKED:
                await self._call("unlock", pid, end)
                state = await self._state(pid, end)
        except (CudaCallError, CudaCallTimeout) as error:
            return f"and could not be put back: {error}"
        return "" if state is CudaState.RUNNING else f"process {pid} is now {state.name.lower()}"

    async def _fail_resume(
        self,
        operation: str,
        pids: Sequence[int],
        errors: Sequence[Failure],
    ) -> NoReturn:
        """Says where each process stands now, then raises."""
        end = self._clock() + self._undo_secs
        lines = []
        out = {error.pid for error in errors if isinstance(error, CudaCallTimeout)}
        for pid in pids:
            if pid in out:
                continue
            try:
                state = await self._state(pid, end)
            except (CudaCallError, CudaCallTimeout) as error:
                lines.append(str(error))
            else:
                lines.append(f"process {pid} is now {state.name.lower()}")
        self._raise("resume", operation, pids, errors, lines)

    # ---- refusing -----------------------------------------------------------------------------

    @staticmethod
    def _raise(
        verb: str,
        operation: str,
        pids: Sequence[int],
        errors: Sequence[Failure],
        lines: Sequence[str],
    ) -> NoReturn:
        text = "; ".join([*(str(error) for error in errors), *lines])
        late = [error.pid for error in errors if isinstance(error, CudaCallTimeout)]
        if late:
            raise DriverTimeout(
                verb,
                names(pids),
                f"{text}; the outcome of {operation} for {names(late)} is unknown",
                hint="the call goes on and must not be interrupted: kill the model, not the helper",
                pids=late,
            )
        codes = [error.code or 0 for error in errors if isinstance(error, CudaCallError)]
        advice = next((ADVICE[code] for code in codes if code in ADVICE), None)
        raise CheckpointFailed(
            verb, names(pids), text, hint=advice, pids=[error.pid for error in errors]
        )

    def _refuse_tainted(self, verb: str, pids: Sequence[int]) -> None:
        for key in [key for key in self._tainted if self._processes.start_ticks(key[0]) != key[1]]:
            del self._tainted[key]
        late = [(pid, operation) for (pid, _), operation in self._tainted.items() if pid in pids]
        if late:
            calls = ", ".join(f"{operation} of process {pid}" for pid, operation in sorted(late))
            raise CheckpointFailed(
                verb,
                names(pids),
                f"an earlier call has not ended: {calls}",
                hint="kill the model; its CUDA state is unknown",
                pids=[pid for pid, _ in late],
            )

    @staticmethod
    def _refuse_failed(verb: str, found: Mapping[int, CudaState]) -> None:
        failed = sorted(pid for pid, state in found.items() if state is CudaState.FAILED)
        if failed:
            raise CheckpointFailed(
                verb,
                names(found),
                f"the CUDA state of {names(failed)} is failed",
                hint="the driver does not bring such a process back: kill the model",
                pids=failed,
            )
