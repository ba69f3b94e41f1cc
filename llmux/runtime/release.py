"""Seeing who holds GPU memory, and that a parked or killed engine's is really free."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from time import monotonic

from llmux.core.effects import RunPlan
from llmux.core.plans import Outcome
from llmux.core.records import parked_share
from llmux.errors import MemoryNotReleased
from llmux.ports import GpuObserver, UnitHandle
from llmux.runtime.drivers import Drivers

POLL_SECS = 0.02  # NVML answers in well under a millisecond per device
SLACK_BYTES = 1 << 30  # contexts and graphs differ between versions by some hundred MiB


async def held_by(drivers: Drivers, *handles: UnitHandle) -> dict[int, int]:
    """pid → bytes of GPU memory, of the units' processes; nothing where it cannot be seen."""
    held: dict[int, int] = {}
    if not handles or not drivers.gpu.available:
        return held
    pids = {pid for handle in handles for pid in await drivers.units.pids(handle)}
    for process in await drivers.gpu.processes():
        if process.pid in pids:
            held[process.pid] = held.get(process.pid, 0) + process.used_bytes
    return held


async def holds_more(
    drivers: Drivers, handle: UnitHandle, gpus: Sequence[int], share: float
) -> bool:
    """Whether the unit is seen to hold more than ``share`` of each of the GPUs."""
    if not drivers.gpu.available:
        return False
    used = sum((await held_by(drivers, handle)).values())
    return used > _bytes_of(share, gpus, await drivers.gpu.totals())


async def verify_release(
    gpu: GpuObserver, effect: RunPlan, used_before: Mapping[int, int], deadline: float
) -> None:
    """Returns when the processes that held memory before hold no more than they may now."""
    if not gpu.available or not used_before:
        return
    allowed = await _allowed(gpu, effect)
    ends = monotonic() + deadline
    while True:
        used = sum(p.used_bytes for p in await gpu.processes() if p.pid in used_before)
        if used <= allowed:
            return
        if monotonic() >= ends:
            raise MemoryNotReleased(
                "free",
                f'GPU memory of model "{effect.model}"',
                f"{used / 2**30:.1f} GiB still held after {deadline:g} s,"
                f" {allowed / 2**30:.1f} GiB expected",
                hint="the driver or the engine keeps it; see `nvidia-smi`",
            )
        await asyncio.sleep(POLL_SECS)


async def _allowed(gpu: GpuObserver, effect: RunPlan) -> float:
    eviction = effect.plan.eviction
    if effect.plan.success is Outcome.DOWN or eviction is None:
        return 0.0
    share = parked_share(effect.config, eviction)
    return _bytes_of(share, effect.gpus, await gpu.totals())


def _bytes_of(share: float, gpus: Sequence[int], totals: Mapping[int, int]) -> float:
    return sum(totals.get(g, 0) * share + SLACK_BYTES for g in gpus)
