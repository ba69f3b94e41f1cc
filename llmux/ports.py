"""Every Protocol through which the supervisor touches the world, and the values they exchange.

Each has a real driver and an in-memory twin (``drivers/memory.py``) that keeps the same rules. All
methods are coroutines that may be called from one event loop only, take a deadline in seconds
where they can wait, and return only what was *observed* after acting. Unless said otherwise they
are idempotent, raise DriverTimeout when the deadline passes (outcome unknown) and DriverError
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from llmux.protocol import Address


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """How to start an engine (or ``criu restore``) inside a new unit.

    ``user``: name to drop to, None = stay who we are. ``runtime_dir`` is made first, owned by that
    user with the set-group-id bit so that the gateway's group can reach the sockets in it.
    """

    model: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    user: str | None
    stdout: str
    stderr: str
    runtime_dir: str
    cwd: str = "/"
    deny_io_uring: bool = True  # not when argv is criu: it restores the filter itself
    properties: Mapping[str, Any] = field(default_factory=dict)  # unit properties, systemd's names


@dataclass(frozen=True, slots=True)
class UnitHandle:
    """A unit with an engine's process tree in it.

    ``pid`` is the root of the tree; ``start_ticks`` (field 22 of /proc/PID/stat) makes it unique.
    ``cgroup`` is the unit's own directory below the cgroup2 mount, None where there are no cgroups.
    """

    model: str
    unit: str
    pid: int
    start_ticks: int
    cgroup: str | None = None


class UnitManager(Protocol):
    """Owns processes: every engine lives in exactly one unit and nothing outlives it."""

    async def start(self, spec: LaunchSpec, deadline: float) -> UnitHandle:
        """A new unit exists, the payload has been exec'ed inside it. Raises UnitFailed (name taken
        by a live unit, user unknown, exec failed: the cause is in it); then nothing is left."""

    async def terminate(self, handle: UnitHandle, deadline: float) -> bool:
        """SIGTERM to the root process, thawed first; True when the whole unit was seen empty in
        time. A child that outlives the root is left for kill()."""

    async def kill(self, handle: UnitHandle, deadline: float) -> None:
        """Kill everything in the unit (cgroup.kill where there are cgroups) and see it gone, its
        name free again. Works on frozen trees. Already gone is fine."""

    async def observe(self) -> Sequence[UnitHandle]:
        """All of llmux's engine units that have a live process now, whoever started them."""

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        """The processes in the unit now; empty when it is gone."""

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        """Call ``on_exit(handle, description)`` once in the loop when the root process has ended;
        description is "exit status 1", "killed by SIGKILL", or "gone" when it was not our child."""

    def unwatch(self, handle: UnitHandle) -> None:
        """No call of on_exit after this returns."""

    async def ending(self) -> bool:
        """Whether all engines are being stopped from outside (their slice, the machine). A frozen
        one cannot hear SIGTERM, and would keep the stop waiting for its timeout."""

    async def close(self) -> None:
        """Give up file descriptors and threads; leaves units as they are (systemd) or kills them
        (direct children, which must not outlive the embedded server)."""


class Freezer(Protocol):
    """cgroup v2 freezer on the ``engine/`` sub-cgroup of a unit."""

    async def freeze(self, handle: UnitHandle, deadline: float) -> None:
        """cgroup.events was seen to say frozen 1. On failure it is thawed again: half-frozen is
        worse."""

    async def thaw(self, handle: UnitHandle, deadline: float) -> None:
        """cgroup.events was seen to say frozen 0. Gone is an error."""

    async def frozen(self, handle: UnitHandle) -> bool: ...


@dataclass(frozen=True, slots=True)
class Canary:
    """A short greedy completion: what the engine said, and its log-probs where it gives them."""

    text: str
    logprobs: tuple[float, ...] = ()


class Engine(Protocol):
    """vLLM's HTTP control API. EngineUnhealthy carries status and body excerpt of a bad answer."""

    async def healthy(self, address: Address, deadline: float) -> bool:
        """One probe of /health: True on 200. False when nobody listens or it answers otherwise."""

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        """Returns as soon as /health says 200."""

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        """/is_sleeping was seen true after /sleep?level=N&mode=wait."""

    async def wake(self, address: Address, tags: Sequence[str], deadline: float) -> None:
        """POST /wake_up, with bounded retries; tags empty = everything."""

    async def reload_weights(self, address: Address, deadline: float) -> None: ...

    async def communicators(self, address: Address, *, up: bool, deadline: float) -> None:
        """Take the collective communicators of a tensor-parallel engine down, or set them up again
        (NCCL's buffers survive neither a CUDA checkpoint nor CRIU). EngineUnhealthy when the engine
        has no hook for it."""

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None: ...

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        """None when the engine has no such endpoint."""

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        """Greedy completion of a fixed prompt (8 tokens, seed fixed), log-probs when available."""

    async def describe(self, address: Address, deadline: float) -> Mapping[str, Any]:
        """{"version": str|None, "max_model_len": int|None, "paths": [..from /openapi.json..]}"""


class EngineOutput(Protocol):
    """Engines' stdout and stderr: to the journal under the engine's own unit, last lines kept."""

    def paths(self, model: str) -> tuple[str, str]:
        """(stdout, stderr) files, append-only, below the model's directory; directory made."""

    def attach(self, handle: UnitHandle) -> None:
        """Follow both files from their present end (or from where a former supervisor stopped)."""

    def detach(self, model: str) -> None:
        """Forward what is left and stop following."""

    def tail(self, model: str, lines: int = 20) -> list[str]:
        """The last lines, oldest first, escape sequences removed."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    gpu: int
    pid: int
    used_bytes: int


class GpuObserver(Protocol):
    """Who holds how much GPU memory: NVML, the tests' ledger, or nothing known."""

    @property
    def available(self) -> bool: ...

    async def gpu_count(self) -> int: ...

    async def processes(self) -> Sequence[GpuProcess]: ...

    async def totals(self) -> Mapping[int, int]:
        """GPU index → bytes of memory."""


class DeviceCheckpointer(Protocol):
    """CUDA state of a set of processes into host memory and back; all or nothing for the set."""

    async def suspend(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """Lock all, checkpoint all; returns the pids that had CUDA state. On failure those already
        locked are unlocked; a process left in FAILED is named in the error (kill it)."""

    async def resume(self, pids: Sequence[int], deadline: float) -> None:
        """Restore all, unlock all, each seen running."""

    async def suspended(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """Those whose CUDA state is in host memory, on the way there or back, or lost. Asked of
        processes that are not frozen."""

    async def check_memory(self, pids: Sequence[int], gpu_used_bytes: int) -> None:
        """CheckpointFailed when host memory (MemAvailable, MemoryMax of their cgroups) cannot take
        what these processes hold on the GPUs: retained weights and the KV cache."""

    async def close(self) -> None:
        """Give up helpers; one in the middle of a driver call is left to finish it."""


class Notifier(Protocol):
    """sd_notify."""

    def ready(self) -> None: ...
    def status(self, text: str) -> None: ...
    def reloading(self) -> None: ...
    def stopping(self) -> None: ...
    def watchdog(self) -> None: ...


class StateStore(Protocol):
    """A small versioned document, replaced atomically. A hint for reconcile, never the truth."""

    def load(self) -> Mapping[str, Any]: ...
    def save(self, document: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Image:
    """A complete checkpoint on disk: CRIU's files and a manifest in ``path``.

    ``identity`` is what must still be so for a restore, by name; ``recipe`` is how the engine was
    parked and so how it is woken, opaque to the dumper. ``managed``: made by llmux below its images
    directory; a directory that the user named (``checkpoint_path``) is never changed or removed.
    """

    model: str
    path: str
    identity: Mapping[str, str]
    recipe: Mapping[str, Any]
    created: float  # seconds since the epoch
    dump_seconds: float
    root_pid: int
    apparent_bytes: int
    disk_bytes: int
    managed: bool = True
    last_used: float = 0.0


@dataclass(frozen=True, slots=True)
class NoImage:
    """Why a model has no image to be restored: none there, or which named field differs."""

    reason: str


@dataclass(frozen=True, slots=True)
class DumpSpec:
    """What goes into an image besides the processes. ``launch`` is how the engine was started.

    ``cold_seconds``: what starting the model without the image takes; its worth when disk is short.
    """

    launch: LaunchSpec
    identity: Mapping[str, str]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    cold_seconds: float = 60.0
    frozen: bool = False  # the engine's cgroup is frozen now


class DumpPhase(StrEnum):
    """Where a dump is. From RELEASED on the processes are gone, and what they held is free."""

    CHECK = "check"
    DUMP = "dump"
    RELEASED = "released"
    PACK = "pack"  # zero blocks dropped, checksums
    SYNC = "sync"
    DONE = "done"


Progress = Callable[[DumpPhase, int, int], None]  # phase, bytes done, bytes in all (0 = unknown)


@dataclass(frozen=True, slots=True)
class CriuFacts:
    """The CRIU on this machine. ``problems`` is empty when checkpointing can work here."""

    path: str
    version: str
    problems: tuple[str, ...]
    frozen_dump: bool = True  # knows --freeze-cgroup


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A dump or restore that a former supervisor did not finish. Its unit must be killed."""

    model: str
    unit: str
    operation: str  # "dump" or "restore"
    shm: tuple[str, ...] = ()  # names in /dev/shm to remove once the unit was killed


class Dumper(Protocol):
    """CRIU images of engine trees: made, kept, trusted only when whole, restored into new units."""

    async def check(self) -> CriuFacts:
        """What there is. Looked up once; raises nothing."""

    async def recover(self) -> Sequence[Interrupted]:
        """Once at start, before anything else: removes half-made images and what they left in
        /dev/shm, ends a CRIU that is still at work, and says which units are therefore unusable. A
        restore is named again, should we end, until it is settled: once its unit was killed."""

    async def precheck(self, handle: UnitHandle) -> int:
        """Bytes that a dump would write now. Raises CheckpointFailed naming process, descriptor and
        remedy when the tree cannot be dumped, Unsupported when CRIU cannot, or without the disk."""

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        """The image is complete on disk, every process of the tree was seen gone, the former image
        of the model is replaced. Raises CheckpointFailed; its ``fields["tree"]`` is "running" (as
        before, may serve on), "broken" (must be killed) or "gone". Not interruptible: cancelled, it
        first ends under its deadline."""

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        """The model's image when it is whole, safe to use and made for just this; ``path`` is the
        configured checkpoint_path."""

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        """The image is in the page cache and its checksums hold. May be cancelled. A restore begun
        meanwhile takes over what was verified."""

    async def restore(
        self,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        spare: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        """The tree lives again in a new unit, every process seen with its old pid and name, the
        image verified. ``launch`` is the engine's as today: unit properties and output files count.
        ``spare``: bytes of host memory to be left beside it. ``progress`` hears of the bytes that
        were read and verified. Raises CheckpointFailed, then nothing of it is left;
        ``fields["blame"]`` is "image" (quarantine it) or "host" (pid or port taken, no memory: the
        image may serve later). Cancelled, it leaves nothing either. Until ``settle`` the restore
        counts as under way."""

    async def settle(self, model: str) -> None:
        """What was restored is in use now, or was ended: recover() of a next supervisor is not to
        end it."""

    async def quarantine(self, image: Image, reason: str) -> str:
        """Never used again, kept with its logs for a look; returns where."""

    async def discard(self, model: str) -> None:
        """The model has no image."""

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        """Names in /dev/shm of what the unit's processes have open there and nobody else has."""

    async def remove_shm(self, names: Sequence[str]) -> None:
        """Once those processes were killed: exactly these names."""

    async def images(self) -> Sequence[Image]:
        """All complete images, whoever made them, without looking into their pages."""
