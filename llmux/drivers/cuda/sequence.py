"""Suspend and resume a set of processes together.

Lock all, checkpoint all; restore all, unlock all; every state read back. The single calls come from
a ``CudaCalls``: drivers/cuda/driver.py makes them through libcuda, drivers/cuda/tool.py through the
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

from llmux.drivers.cuda import host_memory
from llmux.drivers.cuda.calls import (
    ADVICE,
    Code,
    CudaCallError,
    CudaCalls,
    CudaCallTimeout,
    CudaState,
    ProcessTable,
    answered,
    expected,
    names,
)
from llmux.drivers.cuda.failures import Failure, raise_failure
from llmux.errors import Blame, CheckpointFailed, DriverTimeout, TreeState

LOCK_SECS = 30.0  # a drained engine has little submitted work left; CRIU's plugin gives it 10 s
BUSY_PAUSE = 0.05  # between two looks at a driver call of another process
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
        memory: host_memory.HostMemory | None = None,
        lock_secs: float = LOCK_SECS,
        undo_secs: float = UNDO_SECS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = calls
        self._processes = processes or ProcessTable()
        self._memory = memory or host_memory.HostMemory()
        self._lock_secs = lock_secs
        self._undo_secs = undo_secs
        self._clock = clock
        self._tainted: dict[tuple[int, int], str] = {}  # (pid, start ticks) → operation still out
        # Restores that ran out of memory: later ones answer 304 (cuda-checkpoint#44).
        self._lost: set[tuple[int, int]] = set()

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
        errors = await self._each("lock", running, end, lock_secs)
        # A process that called cuInit and made no context has a restore thread and no CUDA state.
        without = {error.pid for error in errors if answered(error, Code.NOT_INITIALIZED)}
        found = {pid: state for pid, state in found.items() if pid not in without}
        touched = [pid for pid in touched if pid not in without]
        errors = [error for error in errors if error.pid not in without]
        if errors:
            await self._fail_suspend("lock", touched, errors)
        errors = await self._each("checkpoint", touched, end)
        if errors:
            await self._fail_suspend("checkpoint", touched, errors)
        errors = await self._wrong(found, CudaState.CHECKPOINTED, end)
        if errors:
            await self._fail_suspend("state", touched, errors)
        return sorted(found)

    async def resume(self, pids: Sequence[int], deadline: float) -> None:
        """All CUDA processes among ``pids`` running: seen so.

        When one cannot be restored none is unlocked: those restored stay locked, the others
        checkpointed, and a second resume continues from there.
        """
        end = await self._begin("resume", pids, deadline)
        gone = [pid for pid in pids if self._processes.start_ticks(pid) is None]
        if gone:
            raise CheckpointFailed(
                "resume",
                names(gone),
                "no such process",
                hint="stop the model",
                tree=TreeState.GONE,
                blame=Blame.ENGINE,
            )
        found = await self._observe("resume", pids, end)
        self._refuse_failed("resume", found)
        parked = [pid for pid, state in found.items() if state is CudaState.CHECKPOINTED]
        halted = [pid for pid, state in found.items() if state is not CudaState.RUNNING]
        for operation, targets in (("restore", parked), ("unlock", halted)):
            errors = await self._each(operation, targets, end)
            if operation == "restore":
                self._lost |= {
                    self._key(error.pid) for error in errors if answered(error, Code.OUT_OF_MEMORY)
                }
            if errors:
                await self._fail_resume(operation, sorted(found), errors)
        errors = await self._wrong(found, CudaState.RUNNING, end)
        if errors:
            await self._fail_resume("state", sorted(found), errors)

    async def suspendable(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        end = await self._begin("look at", pids, deadline)
        return sorted(await self._observe("look at", pids, end))

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
                tree=TreeState.RUNNING,
                hint="park with weights: discard or offload, which give the KV cache back first, "
                "or lower --gpu-memory-utilization",
            )

    async def close(self) -> None:
        """Lets go of helpers; one in mid-operation is left to finish."""
        await self._calls.close()

    async def _begin(self, verb: str, pids: Sequence[int], deadline: float) -> float:
        """Wait for the driver (its start may take seconds); returns the monotonic deadline."""
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
            state = self._state if verb == "look at" else self._settled_state
            states = await asyncio.gather(*(state(pid, end) for pid in with_cuda))
        except CudaCallError as error:
            raise CheckpointFailed(
                verb,
                names(pids),
                str(error),
                hint=ADVICE.get(error.code or 0),
                tree=TreeState.RUNNING if verb == "suspend" else TreeState.BROKEN,
                blame=Blame.ENGINE,
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

    def _key(self, pid: int) -> tuple[int, int]:
        return pid, self._processes.start_ticks(pid) or 0

    async def _settled_state(self, pid: int, end: float) -> CudaState:
        """The state once no call of another process is at work on it, such as one that a former
        supervisor left to finish."""
        while (state := await self._state(pid, end)).busy:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(min(BUSY_PAUSE, max(end - self._clock(), 0.0)))
        return state

    async def _wrong(self, pids: Iterable[int], wanted: CudaState, end: float) -> list[Failure]:
        """Processes not in the wanted state although every call succeeded."""

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
        key = self._key(pid)

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
        """Undo what can be undone, then raise."""
        end = self._clock() + self._undo_secs
        out = {error.pid for error in errors if isinstance(error, CudaCallTimeout)}
        undone = await asyncio.gather(
            *(self._put_back(pid, end) for pid in touched if pid not in out)
        )
        lines = [line for line in undone if line]
        lines += self._deaths(errors)
        tree = TreeState.BROKEN if lines else TreeState.RUNNING
        raise_failure("suspend", operation, touched, errors, lines, tree)

    def _deaths(self, errors: Sequence[Failure]) -> list[str]:
        """A lock may kill its process and answer 304 (cuda-checkpoint#58): not a lack of rights."""
        gone = [error.pid for error in errors if self._processes.start_ticks(error.pid) is None]
        return [f"process {pid} died in the call: the driver or the engine crashed" for pid in gone]

    async def _put_back(self, pid: int, end: float) -> str:
        """Make it run again; returns "" or why not."""
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
        """Raise with the present state of each process."""
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
        raise_failure("resume", operation, pids, errors, lines)

    # ---- refusing -----------------------------------------------------------------------------

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
                blame=Blame.ENGINE,
                pids=[pid for pid, _ in late],
            )

    def _refuse_failed(self, verb: str, found: Mapping[int, CudaState]) -> None:
        failed = sorted(pid for pid, state in found.items() if state is CudaState.FAILED)
        lost = sorted(pid for pid in found if self._key(pid) in self._lost)
        if lost:
            raise CheckpointFailed(
                verb,
                names(found),
                f"{names(lost)} ran out of GPU memory in an earlier restore, which is final",
                hint="kill the model; next time make room on the GPU before it is resumed",
                pids=lost,
            )
        if failed:
            raise CheckpointFailed(
                verb,
                names(found),
                f"the CUDA state of {names(failed)} is failed",
                hint="the driver does not bring such a process back: kill the model",
                blame=Blame.ENGINE,
                pids=failed,
            )
