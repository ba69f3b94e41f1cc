"""GPU and host memory that the engines hold now, for status: looked at when asked, never longer
than a moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from types import MappingProxyType
from typing import Final

from llmux.errors import LlmuxError
from llmux.ports import GpuProcess
from llmux.runtime.engines.instance import Instance
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

LOOK_SECS: Final = 0.3  # NVML answers in milliseconds, or hangs
FRESH_SECS: Final = 1.0  # many may ask for status at once


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes; None where they cannot be seen."""

    gpu: int | None = None
    ram: int | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """Bytes of one GPU: of all processes, and of our engines among them."""

    index: int
    total_bytes: int
    used_bytes: int
    engines_bytes: int


NOTHING: Final[Mapping[str, Held]] = MappingProxyType({})


class Holdings:
    """``instances``: the executor's, by model."""

    def __init__(self, drivers: Drivers, instances: Mapping[str, Instance]) -> None:
        self._drivers = drivers
        self._instances = instances
        self._seen: Mapping[str, Held] = NOTHING
        self._seen_at = float("-inf")
        self.gpus: tuple[Gpu, ...] = ()  # as last seen; empty where they cannot be seen
        self._looking: asyncio.Task[None] | None = None

    async def now(self) -> Mapping[str, Held]:
        """By model, of engines that live; at most ``FRESH_SECS`` old unless looking takes longer
        than ``LOOK_SECS``."""
        if monotonic() - self._seen_at < FRESH_SECS:
            return self._seen
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="look at the engines' memory")
        # one that hangs goes on by itself: a call of the driver cannot be cancelled
        await asyncio.wait([self._looking], timeout=LOOK_SECS)
        return self._seen

    async def _look(self) -> None:
        handles = {n: i.handle for n, i in self._instances.items() if i.handle is not None}
        on_gpu = await self._gpu_processes()
        seen: dict[str, Held] = {}
        ours: set[int] = set()
        for name, handle in handles.items():
            try:
                pids = set(await self._drivers.units.pids(handle))
                ram = await self._drivers.units.memory_bytes(handle)
            except (LlmuxError, OSError) as error:
                log.debug("cannot see the memory of %s: %s", name, error)
                continue
            ours |= pids
            gpu = None if on_gpu is None else sum(p.used_bytes for p in on_gpu if p.pid in pids)
            seen[name] = Held(gpu, ram)
        self.gpus = await self._devices(on_gpu, ours)
        self._seen, self._seen_at = seen, monotonic()

    async def _devices(
        self, on_gpu: Sequence[GpuProcess] | None, ours: Collection[int]
    ) -> tuple[Gpu, ...]:
        if on_gpu is None:
            return ()
        try:
            totals = await self._drivers.gpu.totals()
        except (LlmuxError, OSError) as error:
            log.debug("cannot see the size of the GPUs: %s", error)
            return ()
        return tuple(
            Gpu(
                index,
                total,
                sum(p.used_bytes for p in on_gpu if p.gpu == index),
                sum(p.used_bytes for p in on_gpu if p.gpu == index and p.pid in ours),
            )
            for index, total in sorted(totals.items())
        )

    async def _gpu_processes(self) -> list[GpuProcess] | None:
        if not self._drivers.gpu.available:
            return None
        try:
            return list(await self._drivers.gpu.processes())
        except (LlmuxError, OSError) as error:
            log.debug("cannot see the engines' GPU memory: %s", error)
            return None
