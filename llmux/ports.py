"""The Protocols through which the supervisor touches the world, and the values they exchange;
``image_ports`` has the one of images.

Each has a real driver and an in-memory twin (``tests/twins``) that keeps the same rules. All
methods are coroutines that may be called from one event loop only, take a deadline in seconds
where they can wait, and return only what was *observed* after acting. Unless said otherwise they
are idempotent, raise DriverTimeout when the deadline passes (outcome unknown) and DriverError
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmux.errors import StateFileError
from llmux.protocol import Address


@dataclass(frozen=True, slots=True)
class EngineUser:
    """A user to run as. ``name`` need not be in /etc/passwd; ``groups`` are the supplementary ones.
    ``temporary``: its own directory for temporary files, in a home that is made for it; None: it
    has a home, and uses the system's."""

    name: str
    uid: int
    gid: int
    home: str
    groups: tuple[int, ...] = ()
    temporary: str | None = None


class EngineUsers(Protocol):
    def find(self, model: str) -> EngineUser:
        """The same user for a model every time. Raises LlmuxError."""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """How to start an engine (or ``criu restore``) inside a new unit.

    ``user``: None = stay who we are. ``runtime_dir`` is made first and emptied, owned by that user
    with the set-group-id bit so that the gateway's group can reach the sockets in it.
    """

    model: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    user: EngineUser | None
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


class WeightReader(Protocol):
    async def read(
        self, model: str, model_path: str, env: Mapping[str, str], user: EngineUser | None
    ) -> None:
        """The model's weights lie in the page cache, as far as they are on this host and memory
        allows. May be cancelled: nothing reads on then. Raises nothing of its own."""


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
        """All of llmux's engine units with a live process, also those of a former supervisor."""

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        """The processes in the unit now, with those that left its cgroup; empty when it is gone."""

    async def stranger(self, address: Address, handle: UnitHandle | None) -> str | None:
        """In words, a process outside the unit that a connection to the address could reach; None
        without one."""

    async def cpu_seconds(self, handle: UnitHandle) -> float:
        """CPU time that the unit's present processes have used; 0 when it is gone."""

    async def memory_bytes(self, handle: UnitHandle) -> int:
        """Host memory of the unit's processes, files in the page cache left out; 0 when it is
        gone."""

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        """Call ``on_exit(handle, description)`` once in the loop when the root process has ended;
        description is "exit status 1", "killed by SIGKILL", or "gone" when it was not our child."""

    def unwatch(self, handle: UnitHandle) -> None:
        """No call of on_exit after this returns."""

    async def ending(self) -> bool:
        """Whether all engines are being stopped from outside (their slice, the machine). A frozen
        one does not get SIGTERM and would delay the stop until its timeout."""

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
    """A short deterministic request: the engine's words, and numbers such as log-probs. Empty when
    the engine serves no request that can be compared."""

    text: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Vitals:
    """An engine at one moment. ``status``: of /health, or where that has no answer, of its metrics
    unless that is a 5xx; None = no answer. ``running``: requests that it has. ``progress``: a
    number that moves with its work; both None without such counters."""

    status: int | None
    running: int | None = None
    progress: float | None = None


class Engine(Protocol):
    """vLLM's HTTP control API. EngineUnhealthy carries status and body excerpt of a bad answer."""

    async def healthy(self, address: Address, deadline: float) -> bool:
        """One probe of /health: True on 200. False when nothing listens or on any other answer."""

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

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None:
        """It remembers no block of a prompt. EngineUnhealthy while some are still in use."""

    async def discard_cache(self, address: Address, deadline: float) -> None:
        """The memory of the KV cache is given back, that of the weights is not; the prefix cache
        was reset before, and nothing runs. EngineUnhealthy with a ``status`` below 500 when nothing
        was done."""

    async def return_cache(self, address: Address, deadline: float) -> None:
        """The KV cache has memory again, and may be used. There already is fine."""

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        """None when the engine has no such endpoint."""

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        """The first fixed request that the engine serves: a greedy completion where it can. Empty,
        with a warning, when it serves none."""

    async def sample(self, address: Address, model: str, deadline: float) -> None:
        """A short request answered at random: what the engine compiles for that is compiled then.
        Nothing where it serves no such request. EngineUnhealthy when it cannot answer."""

    async def vitals(self, address: Address, deadline: float) -> Vitals:
        """What it says of itself now; raises nothing. Never queues behind the engine's work."""

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
        """The last lines, oldest first, escape sequences removed; of the model's last engine when
        none is followed."""

    def previous(self, model: str, lines: int = 20) -> list[str]:
        """The last lines of the engine before."""

    def shortage(self) -> str | None:
        """Where there is no room for output, in words; a program that prints then may end of it."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    gpu: int
    pid: int
    used_bytes: int


class MemoryObserver(Protocol):
    """The host's memory, as the kernel sees it."""

    def stalled_percent(self) -> float | None:
        """Percent of the last 10 s in which every task waited for memory (PSI); None where the
        kernel does not say."""


class GpuObserver(Protocol):
    """GPU memory per process: from NVML or the tests' ledger; unavailable where neither exists. A
    process of which the driver does not say how much it holds has a part of what the device has in
    use beyond the others: more than it holds, never less."""

    @property
    def available(self) -> bool: ...

    @property
    def blind(self) -> str | None:
        """Why nothing can be seen now although there are GPUs; None when they can be."""

    async def gpu_count(self) -> int: ...

    async def processes(self) -> Sequence[GpuProcess]: ...

    async def totals(self) -> Mapping[int, int]:
        """GPU index → bytes of memory."""

    async def used(self) -> Mapping[int, int]:
        """GPU index → bytes in use, of whatever process."""


class DeviceCheckpointer(Protocol):
    """CUDA state of a set of processes into host memory and back; all or nothing for the set."""

    async def suspend(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """Lock all, checkpoint all; returns the pids that had CUDA state. On failure those already
        locked are unlocked; a process left in FAILED is named in the error (kill it)."""

    async def resume(self, pids: Sequence[int], deadline: float) -> None:
        """Restore all, unlock all, each seen running. What was resumed must be suspended again
        before it ends: with some drivers the host hangs otherwise (cuda-checkpoint#53)."""

    async def suspendable(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """Processes that a suspend would take along. One that only asked NVML for GPUs is none."""

    async def suspended(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        """Processes whose CUDA state is in host memory, on the way there or back, or lost. They
        must not be frozen."""

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
    """A small versioned document, replaced atomically. A hint for reconcile, never the truth.

    ``load`` raises StateFileError for a damaged one, which it has put aside. ``put_aside``: what
    was loaded cannot be used, so the next ``load`` is to find nothing; what to say of it.
    """

    def load(self) -> Mapping[str, Any]: ...
    def save(self, document: Mapping[str, Any]) -> None: ...
    def put_aside(self, why: str) -> StateFileError: ...


class EventStore(Protocol):
    """The latest events, for the timeline of the next supervisor; bounded, the oldest are dropped.

    ``load`` raises StateFileError when nothing can be read, and leaves out what is damaged.
    ``append`` raises it when the event was not written; the next one may be.
    """

    def load(self) -> Sequence[Mapping[str, Any]]: ...
    def append(self, event: Mapping[str, Any]) -> None: ...
