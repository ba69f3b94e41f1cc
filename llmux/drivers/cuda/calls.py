"""Single calls on the CUDA state of one process: states, codes, errors and their port."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final, Protocol


class CudaState(IntEnum):
    """CUprocessState of cuda.h 12.8, and the last two of 13.4."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5

    @property
    def busy(self) -> bool:
        return self in (CudaState.CHECKPOINTING, CudaState.RESTORING)


class Code(IntEnum):
    """The CUresults that something is decided or advised on."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    OPERATING_SYSTEM = 304
    ILLEGAL_STATE = 401
    NOT_READY = 600
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801


ADVICE: Mapping[int, str] = {
    Code.OUT_OF_MEMORY: "the GPU (or, when suspending, host memory) is not free enough; with MIG "
    "this error comes always",
    Code.OPERATING_SYSTEM: "llmux must run as root, or own the process and may ptrace it; "
    "as root, the driver refuses: known of 575 on H200 (cuda-checkpoint#37), try 580 or later",
    Code.NOT_PERMITTED: "llmux must run as root, or own the process and be allowed to ptrace it",
    Code.ILLEGAL_STATE: "something else checkpoints this process too; never use CRIU's CUDA plugin "
    "and the driver API together",
    Code.NOT_READY: "GPU work submitted earlier did not end in time; was the engine drained?",
    Code.NOT_SUPPORTED: "the driver cannot checkpoint this process: managed memory, MPS, or "
    "CUDA IPC (NCCL) before driver 610",
}


class CudaCallError(Exception):
    """One driver call failed. ``code`` is None when the caller itself broke (helper ended)."""

    def __init__(self, operation: str, pid: int, code: int | None, words: str) -> None:
        super().__init__(f"{operation} of process {pid}: {words}")
        self.operation = operation
        self.pid = pid
        self.code = code
        self.words = words


class CudaCallTimeout(Exception):
    """One driver call has not answered in time and is still running."""

    def __init__(self, operation: str, pid: int) -> None:
        super().__init__(f"{operation} of process {pid} has not ended")
        self.operation = operation
        self.pid = pid


def answered(error: CudaCallError | CudaCallTimeout, code: Code) -> bool:
    return isinstance(error, CudaCallError) and error.code == code


class CudaCalls(Protocol):
    """Single driver calls. Each raises CudaCallError, or CudaCallTimeout after ``timeout`` seconds.

    After a timeout (or a cancellation) the call continues; ``on_late`` is called once when it
    has ended.
    """

    async def ready(self) -> None:
        """Raises Unsupported, naming what is missing, when no call can be made on this machine."""

    async def call(
        self,
        operation: str,
        pid: int,
        timeout: float,
        *,
        on_late: Callable[[], None],
        lock_ms: int = 0,
    ) -> int:
        """``operation``: restore_tid, state, lock, checkpoint, restore, unlock."""

    async def close(self) -> None: ...


class ProcessTable:
    """What /proc says about a process. ``root`` is /proc but in tests."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root

    def start_ticks(self, pid: int) -> int | None:
        """Field 22 of stat: with the pid it names a process for ever. None = gone."""
        try:
            text = (self._root / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        # The command name may hold spaces and parentheses; fields count from the last ")".
        fields = text.rpartition(")")[2].split()
        return None if not fields or fields[0] in ("Z", "X") else int(fields[19])

    def maps_gpu(self, pid: int) -> bool:
        """Does the process map a GPU? One that only asked NVML has /dev/nvidiactl open, no more."""
        try:
            return "/dev/nvidia" in (self._root / str(pid) / "maps").read_text(errors="replace")
        except OSError:
            return False


# What libcuda needs to be found, and nothing that changes what it sees (CUDA_VISIBLE_DEVICES).
PASSED_ENV = ("PATH", "LD_LIBRARY_PATH")

# Children that are not seen to have ended: a caller may be cancelled at any time, and a Popen that
# is collected before warns of its child.
_CHILDREN: Final[list[subprocess.Popen[bytes]]] = []


def call_environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ENV if name in os.environ}
    return {"LC_ALL": "C", **passed, **(extra or {})}


def spawn(
    argv: Sequence[str], env: Mapping[str, str], *, requests: bool
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a child that talks over a socket and is never killed; its exit is an EOF.

    Not ``processes.run``, which kills what overruns its deadline, and not asyncio's subprocess,
    which kills its child when the transport is closed or collected (base_subprocess.py).
    ``requests``: the socket is its stdin too; else it has none, and the socket gets its
    stderr as well.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=theirs.fileno() if requests else subprocess.DEVNULL,
                stdout=theirs.fileno(),
                stderr=None if requests else theirs.fileno(),
                env=dict(env),
                cwd="/",
                # A Ctrl-C in the terminal of `llmux serve` must not reach a call in progress.
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
    _CHILDREN.append(process)
    return process, ours


async def expected(call: Awaitable[int]) -> CudaCallError | CudaCallTimeout | None:
    """The failure of a call as a value, so that one of several does not hide the others."""
    try:
        await call
    except (CudaCallError, CudaCallTimeout) as error:
        return error
    return None


def names(pids: Iterable[int]) -> str:
    """``process 7`` or ``processes 7, 8``."""
    listed = sorted(pids)
    return f"process{'es' if len(listed) != 1 else ''} {', '.join(map(str, listed)) or '(none)'}"
