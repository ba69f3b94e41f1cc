"""Twins of what looks at GPU memory and takes CUDA state off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmux.errors import CheckpointFailed, DriverTimeout
from llmux.ports import GpuProcess
from tests.twins.world import TwinEngine, World


class MemoryGpu:
    """Twin of the GPU observers."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def available(self) -> bool:
        return bool(self._world.gpu_bytes)

    @property
    def blind(self) -> str | None:
        return None

    async def gpu_count(self) -> int:
        await self._world.act("gpu.look", "")
        return len(self._world.gpu_bytes)

    async def processes(self) -> Sequence[GpuProcess]:
        await self._world.act("gpu.look", "")
        return [
            GpuProcess(gpu, engine.handle.pid, used)
            for engine in self._world.engines.values()
            for gpu in engine.gpus
            if gpu < len(self._world.gpu_bytes) and (used := engine.on_gpu)
        ] + [GpuProcess(gpu, pid, held) for pid, (gpu, held) in self._world.foreign.items()]

    async def totals(self) -> Mapping[int, int]:
        await self._world.act("gpu.look", "")
        return dict(enumerate(self._world.gpu_bytes))

    async def used(self) -> Mapping[int, int]:
        await self._world.act("gpu.look", "")
        return {gpu: self._world.used(gpu) for gpu in range(len(self._world.gpu_bytes))}

    async def close(self) -> None:
        """Nothing is held."""


class MemoryCuda:
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
        engine.suspended, engine.restored = True, False
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
        engine.restored = engine.restored or engine.suspended
        engine.suspended = False

    async def suspendable(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        engine = self._owner("look at", pids)
        await self._world.act("cuda.suspendable", engine.handle.model)
        return [engine.handle.pid]

    async def suspended(self, pids: Sequence[int], deadline: float) -> Sequence[int]:
        engine = self._owner("look at", pids)
        await self._world.act("cuda.suspended", engine.handle.model)
        return [engine.handle.pid] if engine.suspended else []

    async def check_memory(self, pids: Sequence[int], gpu_used_bytes: int) -> None:
        model = self._owner("check", pids).handle.model
        await self._world.act("cuda.check_memory", model, gpu_used_bytes)

    async def close(self) -> None:
        self._world.record("cuda.close", "")

    def _owner(self, operation: str, pids: Sequence[int]) -> TwinEngine:
        for engine in self._world.engines.values():
            if engine.handle.pid in pids:
                return engine
        raise CheckpointFailed(operation, f"processes {list(pids)}", "they are gone")
