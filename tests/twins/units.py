"""Twins of what runs an engine: its unit, the freezer, its output files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from llmux.drivers.processes.spawn import unit_name
from llmux.errors import FreezeFailed, UnitFailed
from llmux.ports import LaunchSpec, UnitHandle
from llmux.protocol import Address
from tests.twins.world import GIB, Size, TwinEngine, World

DEFAULT_SHARE: Final = 0.9  # vLLM's --gpu-memory-utilization


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
        engine = new_engine(self._world, handle, spec)
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

    async def stranger(self, address: Address, handle: UnitHandle | None) -> str | None:
        await self._world.act("units.stranger", "" if handle is None else handle.model)
        if handle is None and address.port is None:
            return None
        return self._world.strangers.get(address.port or address.uds or "")

    async def cpu_seconds(self, handle: UnitHandle) -> float:
        await self._world.act("units.cpu_seconds", handle.model)
        used = self._world.cpu_seconds.get(handle.model, 0.0)
        self._world.cpu_seconds[handle.model] = used + self._world.cpu_per_look.get(handle.model, 0)
        return used

    async def memory_bytes(self, handle: UnitHandle) -> int:
        await self._world.act("units.memory_bytes", handle.model)
        return 0 if self._world.find(handle) is None else GIB

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

    def _find(self, operation: str, handle: UnitHandle) -> TwinEngine:
        engine = self._world.find(handle)
        if engine is None:
            raise FreezeFailed(operation, f'model "{handle.model}"', f"{handle.unit} is gone")
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

    def previous(self, model: str, lines: int = 20) -> list[str]:
        return self._world.output.get(f"{model} before", [])[-lines:] if lines > 0 else []

    def shortage(self) -> str | None:
        return "\n".join(self._world.output.get("no room", [])) or None

    async def close(self) -> None:
        self.attached.clear()


def new_engine(world: World, handle: UnitHandle, spec: LaunchSpec) -> TwinEngine:
    visible = spec.env.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(int(gpu) for gpu in visible.split(",") if gpu) if visible is not None else (0,)
    size = world.sizes.get(spec.model, Size())
    share = float(_flag(spec.argv, "--gpu-memory-utilization") or DEFAULT_SHARE)
    capacity = min((world.gpu_bytes[gpu] for gpu in gpus if gpu < len(world.gpu_bytes)), default=0)
    kv_cache = max(int(capacity * share) - size.context - size.weights, 0)
    uds, port = _flag(spec.argv, "--uds"), _flag(spec.argv, "--port")
    return TwinEngine(
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
