"""The pretended machine that the in-memory twins of the drivers act on.

``World`` has GPUs with a size, engines with processes and memory, images on a disk. The twins keep
the real drivers' rules: ``memory_units``, ``memory_engine``, ``memory_gpu``, ``memory_disk``. A
test looks at ``world.calls``, orders faults (``fail``, ``hold``), lets engines die (``exit``) and
asks ``world.violations`` what was done that must never be done. Nothing here ever waits in real
time: only for a ``Hold`` that a test has placed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llmux.drivers.processes.spawn import unit_name
from llmux.errors import DriverError
from llmux.image_ports import Image
from llmux.ports import LaunchSpec, UnitHandle, Vitals
from llmux.protocol import Address

GIB: Final = 1024**3


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a twin: ``operation`` is "units.start", "engine.sleep", …"""

    operation: str
    model: str
    args: tuple[Any, ...] = ()


class Hold:
    """A call stands still here until the test decides."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._go = asyncio.Event()
        self._error: Exception | None = None

    def release(self) -> None:
        """Let the call continue."""
        self._go.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._go.set()

    async def wait(self) -> None:
        self.reached.set()
        await self._go.wait()
        if self._error is not None:
            raise self._error


@dataclass(slots=True)
class _Fault:
    operation: str
    model: str | None
    skip: int  # matching calls that still go through
    error: Exception | None
    hold: Hold | None
    always: bool = False


@dataclass(slots=True, eq=False)
class TwinEngine:
    """A process tree with an engine in it."""

    handle: UnitHandle
    spec: LaunchSpec
    address: Address
    gpus: tuple[int, ...]
    healthy: bool = True
    frozen: bool = False
    suspended: bool = False  # its CUDA state is in host memory
    restored: bool = False  # its CUDA state came back, and is on the GPU
    level: int = 0  # of sleep; 0 = awake
    asleep: set[str] = field(default_factory=set)  # tags: weights, kv_cache
    spoiled: bool = False  # weights were discarded and not reloaded
    remembers: bool = False  # blocks of prompts, in its prefix cache
    cacheless: bool = False  # its KV cache alone was discarded
    held: dict[str, int] = field(default_factory=dict)  # kind → bytes on each of its GPUs
    used: dict[str, int] = field(default_factory=dict)  # the same when awake
    dying: str | None = None

    @property
    def on_gpu(self) -> int:
        """Bytes on each of its GPUs now."""
        return 0 if self.suspended else sum(self.held.values())


@dataclass(slots=True)
class Size:
    """What an engine takes on each of its GPUs: a context that stays, weights, the rest is KV
    cache."""

    context: int = 1 * GIB
    weights: int = 8 * GIB


class World:
    """The machine. ``gpu_bytes``: memory of each GPU; empty = no GPU, nothing is accounted."""

    def __init__(self, gpu_bytes: Sequence[int] = (80 * GIB,)) -> None:
        self.gpu_bytes = tuple(gpu_bytes)
        self.calls: list[Call] = []
        self.violations: list[str] = []
        self.engines: dict[str, TwinEngine] = {}
        self.sizes: dict[str, Size] = {}
        self.in_flight: dict[str, int] = {}  # set by tests: requests running on a model now
        self.images: dict[str, Image] = {}
        self.arrived: dict[str, Image] = {}
        self.dumped: dict[str, TwinEngine] = {}
        self.foreign: dict[int, tuple[int, int]] = {}  # set by tests: pid → (GPU, bytes)
        self.hung_hosts: list[str] = []  # engines that ended restored, not suspended again
        self.restoring: set[str] = set()  # models whose restore is not confirmed
        self.obstacles: dict[str, str] = {}  # set by tests: what prevents a dump of a model
        self.criu_problems: tuple[str, ...] = ()  # set by tests
        self.memory_bytes = 1024 * GIB  # of the host, available
        self.output: dict[str, list[str]] = {}
        self.vitals: dict[str, Vitals] = {}  # set by tests; an engine without lives
        self.progress_per_look: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.cpu_per_look: dict[str, float] = {}
        self.version = "0.32.0"  # of every engine
        self.strangers: dict[int | str, str] = {}  # port or path → what else listens there
        self.unready: set[str] = set()  # models whose /health stays 503 until removed from here
        self._faults: list[_Fault] = []
        self._next_pid = 1000
        self._ticks = 0
        self._watched: dict[tuple[int, int], Callable[[UnitHandle, str], None]] = {}

    # ---- what tests do --------------------------------------------------------------------------

    def fail(
        self,
        operation: str,
        error: Exception | None = None,
        *,
        nth: int = 1,
        model: str | None = None,
        always: bool = False,
    ) -> None:
        """The ``nth`` call of ``operation`` from now on raises ``error`` (a DriverError by
        default)."""
        if error is None:
            error = DriverError(operation, f'model "{model or "any"}"', "a fault was ordered")
        self._faults.append(_Fault(operation, model, nth - 1, error, None, always))

    def hold(self, operation: str, *, nth: int = 1, model: str | None = None) -> Hold:
        """The ``nth`` call of ``operation`` stands still until the test lets it go."""
        hold = Hold()
        self._faults.append(_Fault(operation, model, nth - 1, None, hold))
        return hold

    def exit(self, model: str, description: str = "killed by SIGSEGV") -> None:
        """The engine's processes end by themselves."""
        engine = self.engines.pop(model)
        if engine.restored:
            self.hung_hosts.append(model)
        callback = self._watched.pop((engine.handle.pid, engine.handle.start_ticks), None)
        if callback is not None:
            asyncio.get_running_loop().call_soon(callback, engine.handle, description)

    def used(self, gpu: int) -> int:
        """Bytes in use on a GPU."""
        foreign = sum(held for on, held in self.foreign.values() if on == gpu)
        return sum(e.on_gpu for e in self.engines.values() if gpu in e.gpus) + foreign

    def names(self, *operations: str) -> list[str]:
        """ "operation model" of each call in order, of these operations when any are given."""
        chosen = [c for c in self.calls if not operations or c.operation in operations]
        return [f"{call.operation} {call.model}".rstrip() for call in chosen]

    # ---- what the twins do ----------------------------------------------------------------------

    async def act(self, operation: str, model: str, *args: Any) -> None:
        """Record a call and suffer its faults."""
        self.record(operation, model, *args)
        for fault in list(self._faults):
            if fault.operation != operation or fault.model not in (None, model):
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if not fault.always:
                self._faults.remove(fault)
            if fault.hold is not None:
                await fault.hold.wait()
            if fault.error is not None:
                raise fault.error
            return

    def record(self, operation: str, model: str, *args: Any) -> None:
        self.calls.append(Call(operation, model, args))

    def violate(self, text: str) -> None:
        self.violations.append(text)

    def new_handle(self, model: str) -> UnitHandle:
        self._next_pid += 10
        self._ticks += 1
        unit = unit_name(model)
        return UnitHandle(model, unit, self._next_pid, self._ticks, f"/llmux.slice/{unit}")

    def find(self, handle: UnitHandle) -> TwinEngine | None:
        engine = self.engines.get(handle.model)
        return engine if engine is not None and engine.handle == handle else None

    def at(self, address: Address) -> TwinEngine | None:
        return next((e for e in self.engines.values() if e.address == address), None)

    def take(self, engine: TwinEngine, wanted: Mapping[str, int]) -> str | None:
        """Memory on all its GPUs or none; the text of CUDA's complaint when it does not fit."""
        need = sum(wanted.values())
        for gpu in engine.gpus:
            if gpu >= len(self.gpu_bytes):
                continue
            free = self.gpu_bytes[gpu] - self.used(gpu)
            if need > free:
                model = engine.handle.model
                holders = [
                    name
                    for name, other in self.engines.items()
                    if other is not engine and gpu in other.gpus and other.on_gpu
                ]
                self.violate(f"{model} wants memory of GPU {gpu} that {', '.join(holders)} hold")
                return (
                    f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
                    f" {need / GIB:.2f} GiB. GPU {gpu} has a total capacity of"
                    f" {self.gpu_bytes[gpu] / GIB:.2f} GiB of which {free / GIB:.2f} GiB is free."
                )
        engine.held.update(wanted)
        return None

    def watch(self, handle: UnitHandle, callback: Callable[[UnitHandle, str], None]) -> None:
        self._watched[handle.pid, handle.start_ticks] = callback

    def unwatch(self, handle: UnitHandle) -> None:
        self._watched.pop((handle.pid, handle.start_ticks), None)

    def busy(self, model: str, act: str) -> None:
        if self.in_flight.get(model, 0):
            self.violate(f"{act} of {model} with {self.in_flight[model]} requests in flight")
