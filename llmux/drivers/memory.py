"""In-memory twins of every port, on one pretended machine, with the same rules as the real drivers.

``World`` is the machine: GPUs with a size, engines with processes and memory, images on a disk. The
twins act on it. A test looks at ``world.calls``, orders faults (``fail``, ``hold``), lets engines
die (``exit``) and asks ``world.violations`` what was done that must never be done. Nothing here
ever waits in real time: only for a ``Hold`` that a test has placed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from llmux.drivers.spawn import unit_name
from llmux.errors import (
    CheckpointFailed,
    DriverError,
    DriverTimeout,
    EngineUnhealthy,
    FreezeFailed,
    StateFileError,
    UnitFailed,
)
from llmux.ports import (
    Canary,
    CriuFacts,
    DumpPhase,
    DumpSpec,
    GpuProcess,
    Image,
    Interrupted,
    LaunchSpec,
    NoImage,
    Progress,
    UnitHandle,
)
from llmux.protocol import Address

GIB: Final = 1024**3
DEFAULT_SHARE: Final = 0.9  # vLLM's --gpu-memory-utilization
GARBAGE: Final = "!!!!!!!!"


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
        """Let it go on as if nothing had been."""
        self._go.set()

    def time_out(self) -> None:
        """Its deadline passes now: DriverTimeout."""
        self.fail(DriverTimeout("wait for", "the twin", "the deadline passed"))

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
class _Engine:
    """A process tree with an engine in it."""

    handle: UnitHandle
    spec: LaunchSpec
    address: Address
    gpus: tuple[int, ...]
    healthy: bool = True
    frozen: bool = False
    suspended: bool = False  # its CUDA state is in host memory
    level: int = 0  # of sleep; 0 = awake
    asleep: set[str] = field(default_factory=set)  # tags: weights, kv_cache
    spoiled: bool = False  # weights were discarded and not reloaded
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
        self.engines: dict[str, _Engine] = {}
        self.sizes: dict[str, Size] = {}
        self.in_flight: dict[str, int] = {}  # set by tests: requests running on a model now
        self.images: dict[str, Image] = {}
        self.dumped: dict[str, _Engine] = {}
        self.restoring: set[str] = set()  # models whose restore nobody has settled
        self.memory_bytes = 1024 * GIB  # of the host, available
        self.output: dict[str, list[str]] = {}
        self.notified: list[str] = []
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
        callback = self._watched.pop((engine.handle.pid, engine.handle.start_ticks), None)
        if callback is not None:
            asyncio.get_running_loop().call_soon(callback, engine.handle, description)

    def used(self, gpu: int) -> int:
        """Bytes in use on a GPU."""
        return sum(e.on_gpu for e in self.engines.values() if gpu in e.gpus)

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

    def find(self, handle: UnitHandle) -> _Engine | None:
        engine = self.engines.get(handle.model)
        return engine if engine is not None and engine.handle == handle else None

    def at(self, address: Address) -> _Engine | None:
        return next((e for e in self.engines.values() if e.address == address), None)

    def take(self, engine: _Engine, wanted: Mapping[str, int]) -> str | None:
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


class MemoryUnits:
    """Twin of SystemdUnits. An engine whose memory does not fit starts, says why, and dies."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(self, spec: LaunchSpec, deadline: float) -> UnitHandle:
        await self._world.act("units.start", spec.model, spec)
        target = f'model "{spec.model}"'
        if spec.model in self._world.engines:
            raise UnitFailed("start", target, f"{unit_name(spec.model)} exists already")
        handle = self._world.new_handle(spec.model)
        engine = _new_engine(self._world, handle, spec)
        self._world.engines[spec.model] = engine
        # A new engine says nothing yet; tail() must not show its predecessor's last words.
        self._world.output[spec.model] = []
        complaint = self._world.take(engine, engine.used)
        if complaint is not None:
            engine.healthy = False
            engine.dying = complaint
            self._world.output[spec.model] += ["Traceback (most recent call last):", complaint]
            asyncio.get_running_loop().call_soon(self._die, handle)
        return handle

    def _die(self, handle: UnitHandle) -> None:
        if self._world.find(handle) is not None:
            self._world.exit(handle.model, "exit status 1")

    async def terminate(self, handle: UnitHandle, deadline: float) -> bool:
        engine = self._world.find(handle)
        if engine is not None:
            engine.frozen = False  # thawed first, as the real one does
            if engine.suspended:
                self._world.violate(f"SIGTERM to {handle.model} with its CUDA state suspended")
        await self._world.act("units.terminate", handle.model)
        if self._world.find(handle) is not None:
            self._world.exit(handle.model, "killed by SIGTERM")
        return True

    async def kill(self, handle: UnitHandle, deadline: float) -> None:
        await self._world.act("units.kill", handle.model)
        if self._world.find(handle) is not None:
            self._world.exit(handle.model, "killed by SIGKILL")

    async def observe(self) -> Sequence[UnitHandle]:
        await self._world.act("units.observe", "")
        return [engine.handle for engine in self._world.engines.values()]

    async def ending(self) -> bool:
        return False

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        engine = self._world.find(handle)
        return [] if engine is None else [handle.pid, handle.pid + 1, handle.pid + 2]

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        self._world.record("units.watch", handle.model)
        self._world.watch(handle, on_exit)
        if self._world.find(handle) is None:
            asyncio.get_running_loop().call_soon(self._gone, handle)

    def _gone(self, handle: UnitHandle) -> None:
        callback = self._world._watched.pop((handle.pid, handle.start_ticks), None)
        if callback is not None:
            callback(handle, "gone")

    def unwatch(self, handle: UnitHandle) -> None:
        self._world.record("units.unwatch", handle.model)
        self._world.unwatch(handle)

    async def close(self) -> None:
        self._world.record("units.close", "")


class MemoryFreezer:
    """Twin of CgroupFreezer."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def freeze(self, handle: UnitHandle, deadline: float) -> None:
        self._world.busy(handle.model, "freeze")
        await self._world.act("freezer.freeze", handle.model)
        self._find("freeze", handle).frozen = True

    async def thaw(self, handle: UnitHandle, deadline: float) -> None:
        await self._world.act("freezer.thaw", handle.model)
        self._find("thaw", handle).frozen = False

    async def frozen(self, handle: UnitHandle) -> bool:
        engine = self._world.find(handle)
        return engine is not None and engine.frozen

    async def close(self) -> None:
        self._world.record("freezer.close", "")

    def _find(self, operation: str, handle: UnitHandle) -> _Engine:
        engine = self._world.find(handle)
        if engine is None:
            raise FreezeFailed(operation, f'model "{handle.model}"', f"{handle.unit} is gone")
        return engine


class MemoryEngine:
    """Twin of VllmEngine. A call to a frozen or suspended engine is a violation: it would hang."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def healthy(self, address: Address, deadline: float) -> bool:
        engine = self._world.at(address)
        await self._world.act("engine.healthy", engine.handle.model if engine else "")
        return engine is not None and self._answers(engine) and self._is_ready(engine)

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        engine = self._world.at(address)
        await self._world.act("engine.wait_healthy", engine.handle.model if engine else "")
        engine = self._world.at(address)
        if engine is None or not self._answers(engine) or not self._is_ready(engine):
            last = (engine.dying if engine else None) or "/health did not say 200"
            raise DriverTimeout("wait for", f"the engine at {address}", last)

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        if (engine := self._world.at(address)) is not None:
            self._world.busy(engine.handle.model, "sleep")
        engine = await self._reach("engine.sleep", "put to sleep", address, level)
        engine.level = level
        engine.asleep = {"weights", "kv_cache"}
        engine.held = {"context": engine.used["context"]}
        engine.spoiled = engine.spoiled or level >= 2

    async def wake(self, address: Address, tags: Sequence[str], deadline: float) -> None:
        engine = await self._reach("engine.wake", "wake", address, *tags)
        wanted = {
            kind: engine.used[kind]
            for kind in (tags or ("weights", "kv_cache"))
            if kind in engine.asleep
        }
        complaint = self._world.take(engine, wanted)
        if complaint is not None:
            raise EngineUnhealthy(
                "wake",
                f"the engine at {address}",
                f"/wake_up answered 500: {complaint}",
                status=500,
            )
        engine.asleep -= set(wanted)
        if not engine.asleep:
            engine.level = 0

    async def reload_weights(self, address: Address, deadline: float) -> None:
        engine = await self._reach("engine.reload_weights", "reload the weights of", address)
        if "weights" in engine.asleep:
            self._world.violate(f"reload of {engine.handle.model} before its weights are awake")
        engine.spoiled = False

    async def communicators(self, address: Address, *, up: bool, deadline: float) -> None:
        verb = "restore" if up else "suspend"
        await self._reach("engine.communicators", f"{verb} the communicators of", address, verb)

    async def reset_prefix_cache(self, address: Address, deadline: float) -> None:
        await self._reach("engine.reset_prefix_cache", "reset the prefix cache of", address)

    async def sleeping(self, address: Address, deadline: float) -> bool | None:
        engine = await self._reach("engine.sleeping", "ask", address)
        return bool(engine.asleep)

    async def canary(self, address: Address, model: str, deadline: float) -> Canary:
        engine = await self._reach("engine.canary", "test", address)
        if engine.asleep:
            # It hangs until somebody wakes it (vLLM 0.32).
            self._world.violate(f"canary of {model} while it sleeps")
            raise DriverTimeout("test", f"the engine at {address}", "no answer: it sleeps")
        if engine.spoiled:
            return Canary(GARBAGE, (-9.0,))
        return Canary(f"{model} says Paris", (-0.5, -0.25))

    async def describe(self, address: Address, deadline: float) -> Mapping[str, Any]:
        await self._reach("engine.describe", "describe", address)
        paths = ["/v1/completions", "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc"]
        return {"version": "0.32.0", "max_model_len": 4096, "paths": paths}

    def _is_ready(self, engine: _Engine) -> bool:
        return engine.healthy and engine.handle.model not in self._world.unready

    def _answers(self, engine: _Engine) -> bool:
        return not (engine.frozen or engine.suspended)

    async def _reach(self, call: str, operation: str, address: Address, *args: Any) -> _Engine:
        engine = self._world.at(address)
        await self._world.act(call, engine.handle.model if engine else "", *args)
        engine = self._world.at(address)  # it may have died while the call stood still
        target = f"the engine at {address}"
        if engine is None:
            raise EngineUnhealthy(operation, target, "nobody listens")
        if not self._answers(engine):
            state = "frozen" if engine.frozen else "suspended"
            self._world.violate(f"{call} of {engine.handle.model} while it is {state}")
            raise DriverTimeout(operation, target, f"no answer: it is {state}")
        return engine


class MemoryOutput:
    """Twin of EngineFiles: lines that tests put into ``world.output``."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.attached: dict[str, UnitHandle] = {}

    def paths(self, model: str) -> tuple[str, str]:
        return f"/images/{model}/stdout.log", f"/images/{model}/stderr.log"

    def attach(self, handle: UnitHandle) -> None:
        self._world.record("output.attach", handle.model)
        self.attached[handle.model] = handle

    def detach(self, model: str) -> None:
        self._world.record("output.detach", model)
        self.attached.pop(model, None)

    def tail(self, model: str, lines: int = 20) -> list[str]:
        return self._world.output.get(model, [])[-lines:] if lines > 0 else []

    async def close(self) -> None:
        self.attached.clear()


class MemoryGpu:
    """Twin of the GPU observers."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def available(self) -> bool:
        return bool(self._world.gpu_bytes)

    async def gpu_count(self) -> int:
        return len(self._world.gpu_bytes)

    async def processes(self) -> Sequence[GpuProcess]:
        return [
            GpuProcess(gpu, engine.handle.pid, used)
            for engine in self._world.engines.values()
            for gpu in engine.gpus
            if gpu < len(self._world.gpu_bytes) and (used := engine.on_gpu)
        ]

    async def totals(self) -> Mapping[int, int]:
        return dict(enumerate(self._world.gpu_bytes))

    async def close(self) -> None:
        """Nothing is held."""


class MemoryCheckpointer:
    """Twin of the CUDA driver: an engine's memory leaves its GPUs and comes back as a whole."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def suspend(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        engine = self._owner("suspend", pids)
        model = engine.handle.model
        self._world.busy(model, "suspend")
        if engine.frozen:
            self._world.violate(f"CUDA act on {model} while it is frozen")
            raise DriverTimeout("suspend", f'model "{model}"', "frozen threads cannot be locked")
        await self._world.act("cuda.suspend", model)
        engine.suspended = True
        return [engine.handle.pid]

    async def resume(self, pids: Sequence[int], deadline: float) -> None:
        engine = self._owner("resume", pids)
        model = engine.handle.model
        if engine.frozen:
            self._world.violate(f"CUDA act on {model} while it is frozen")
            raise DriverTimeout("resume", f'model "{model}"', "frozen threads cannot be unlocked")
        await self._world.act("cuda.resume", model)
        held, engine.held = engine.held, {}
        complaint = self._world.take(engine, held) if engine.suspended else None
        if complaint is not None:
            raise CheckpointFailed("resume", f'model "{model}"', complaint)
        engine.held = held
        engine.suspended = False

    async def check_memory(self, pids: Sequence[int], gpu_used_bytes: int) -> None:
        await self._world.act("cuda.check_memory", self._owner("check", pids).handle.model)

    async def close(self) -> None:
        self._world.record("cuda.close", "")

    def _owner(self, operation: str, pids: Sequence[int]) -> _Engine:
        for engine in self._world.engines.values():
            if engine.handle.pid in pids:
                return engine
        raise CheckpointFailed(operation, f"processes {list(pids)}", "they are gone")


class MemoryDumper:
    """Twin of the CRIU driver: one image per model, on a disk without limits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.interrupted: list[Interrupted] = []

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        return ()

    async def remove_shm(self, names: Sequence[str]) -> None:
        assert not names, "the twin's engines have nothing in /dev/shm"

    async def check(self) -> CriuFacts:
        self._world.record("dumper.check", "")
        return CriuFacts("/usr/sbin/criu", "4.2.1", ())

    async def recover(self) -> Sequence[Interrupted]:
        await self._world.act("dumper.recover", "")
        found, self.interrupted = self.interrupted, []
        for model in sorted(self._world.restoring):
            found.append(Interrupted(model, unit_name(model), "restore"))
        return found

    async def precheck(self, handle: UnitHandle) -> int:
        await self._world.act("dumper.precheck", handle.model)
        return 1 * GIB

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        target = f'model "{handle.model}"'
        self._world.busy(handle.model, "dump")
        engine = self._world.find(handle)
        if engine is None:
            raise CheckpointFailed("dump", target, "its processes are gone", tree="gone")
        if engine.held and not engine.suspended and self._world.gpu_bytes:
            self._world.violate(f"dump of {handle.model} with memory on a GPU")
        if engine.frozen and not spec.frozen:
            self._world.violate(f"dump of {handle.model}, which is frozen, as if it ran")
        try:
            await self._world.act("dumper.dump", handle.model, spec)
        except DriverError as error:
            error.fields.setdefault("tree", "running")
            raise
        del self._world.engines[handle.model]
        self._world.unwatch(handle)
        image = Image(
            model=handle.model,
            path=f"/images/{handle.model}/current",
            identity=dict(spec.identity),
            recipe=dict(spec.recipe),
            created=0.0,
            dump_seconds=1.0,
            root_pid=handle.pid,
            apparent_bytes=2 * GIB,
            disk_bytes=1 * GIB,
        )
        self._world.dumped[image.path] = engine
        self._world.images[handle.model] = image
        if progress is not None:
            progress(DumpPhase.RELEASED, 0, 0)
            progress(DumpPhase.DONE, image.disk_bytes, image.disk_bytes)
        return image

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        self._world.record("dumper.find", model)
        image = self._world.images.get(model)
        if image is None:
            return NoImage(f'there is no image of model "{model}"')
        for key in sorted({*identity, *image.identity}):
            if identity.get(key) != image.identity.get(key):
                return NoImage(f"{key} differs")
        return image

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        await self._world.act("dumper.read_ahead", image.model)

    async def restore(
        self,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        spare: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        target = f'model "{image.model}"'
        if self._world.memory_bytes < image.apparent_bytes + spare:
            raise CheckpointFailed("restore", target, "not enough memory", blame="host")
        self._world.restoring.add(image.model)
        if progress is not None:
            progress(DumpPhase.PACK, image.apparent_bytes, image.apparent_bytes)
        try:
            return await self._restore(image, launch)
        except BaseException:
            self._world.restoring.discard(image.model)
            raise

    async def settle(self, model: str) -> None:
        await self._world.act("dumper.settle", model)
        self._world.restoring.discard(model)

    async def _restore(self, image: Image, launch: LaunchSpec) -> UnitHandle:
        target = f'model "{image.model}"'
        await self._world.act("dumper.restore", image.model, launch)
        engine = self._world.dumped.get(image.path)
        if engine is None:
            raise CheckpointFailed("restore", target, "the image is not complete", blame="image")
        if image.model in self._world.engines:
            raise CheckpointFailed("restore", target, "its pid is taken", blame="host")
        fresh = self._world.new_handle(image.model)
        handle = replace(fresh, pid=image.root_pid)  # CRIU gives every process its old pid
        self._world.engines[image.model] = replace(
            engine, handle=handle, frozen=False, held=dict(engine.held), asleep=set(engine.asleep)
        )
        return handle

    async def quarantine(self, image: Image, reason: str) -> str:
        await self._world.act("dumper.quarantine", image.model, reason)
        self._world.images.pop(image.model, None)
        return f"{image.path}.quarantine"

    async def discard(self, model: str) -> None:
        await self._world.act("dumper.discard", model)
        self._world.images.pop(model, None)

    async def images(self) -> Sequence[Image]:
        return list(self._world.images.values())


class MemoryNotifier:
    """Twin of SdNotifier: the messages in ``world.notified``."""

    def __init__(self, world: World) -> None:
        self._world = world

    def ready(self) -> None:
        self._world.notified.append("READY=1")

    def status(self, text: str) -> None:
        self._world.notified.append(f"STATUS={text}")

    def reloading(self) -> None:
        self._world.notified.append("RELOADING=1")

    def stopping(self) -> None:
        self._world.notified.append("STOPPING=1")

    def watchdog(self) -> None:
        self._world.notified.append("WATCHDOG=1")


class MemoryStore:
    """Twin of FileStateStore. ``broken`` makes it unreadable until the next save."""

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        self.document: Mapping[str, Any] = dict(document or {})
        self.broken: str | None = None
        self.saves = 0

    def load(self) -> Mapping[str, Any]:
        if self.broken is not None:
            raise StateFileError(f"cannot read the state file (memory): {self.broken}")
        return dict(self.document)

    def save(self, document: Mapping[str, Any]) -> None:
        self.document = dict(document)
        self.broken = None
        self.saves += 1


def _new_engine(world: World, handle: UnitHandle, spec: LaunchSpec) -> _Engine:
    visible = spec.env.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(int(gpu) for gpu in visible.split(",") if gpu) if visible is not None else (0,)
    size = world.sizes.get(spec.model, Size())
    share = float(_flag(spec.argv, "--gpu-memory-utilization") or DEFAULT_SHARE)
    capacity = min((world.gpu_bytes[gpu] for gpu in gpus if gpu < len(world.gpu_bytes)), default=0)
    kv_cache = max(int(capacity * share) - size.context - size.weights, 0)
    uds, port = _flag(spec.argv, "--uds"), _flag(spec.argv, "--port")
    return _Engine(
        handle,
        spec,
        Address(uds=uds) if uds else Address(port=int(port or 8000)),
        gpus if world.gpu_bytes else (),
        used={"context": size.context, "weights": size.weights, "kv_cache": kv_cache},
    )


def _flag(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag, as ``--flag value`` or ``--flag=value``; the last one wins."""
    found = None
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            found = argv[index + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found
