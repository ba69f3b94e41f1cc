"""GPU memory held by engines, and the check that a parked or killed engine released it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from math import ceil

from llmux.config.schema import ModelConfig
from llmux.core.effects import RunPlan
from llmux.core.plans import Outcome
from llmux.core.records import keeps_gpu, parked_share
from llmux.errors import Blame, CheckpointFailed, LlmuxError, MemoryNotReleased
from llmux.ports import GpuObserver, UnitHandle
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

LOOK_SECS = 0.5  # before an engine is ended; NVML answers in milliseconds, or hangs
POLL_SECS = 0.02  # NVML answers in well under a millisecond per device
# Before a start or a wake: a driver that is late with a release needs a second or two.
ROOM_SECS = 5.0
SETTLED_SECS = 0.5  # so long without a change: the driver has given back what it will
CLAIM_SLACK = 0.01  # of a GPU: more than rounding, less than what a neighbour would miss
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


async def held_before(drivers: Drivers, handle: UnitHandle) -> dict[int, int]:
    """pid → bytes of GPU memory, to verify the release later. When the GPUs cannot be seen now, all
    processes of the unit with an unknown amount (0): looking never stands before acting."""
    if not drivers.gpu.available:
        return {}
    try:
        async with asyncio.timeout(LOOK_SECS):
            return await held_by(drivers, handle)
    except (LlmuxError, OSError) as error:  # a TimeoutError is an OSError
        log.warning(
            "cannot see the GPU memory of %s: %s",
            handle.model,
            str(error) or f"no answer within {LOOK_SECS:g} s",
            extra={"model": handle.model},
        )
        return dict.fromkeys(await drivers.units.pids(handle), 0)


async def total_held(drivers: Drivers, handle: UnitHandle) -> int | None:
    """Bytes of GPU memory of the unit's processes; None where it cannot be seen."""
    if not drivers.gpu.available:
        return None
    return sum((await held_by(drivers, handle)).values())


async def awake_share(drivers: Drivers, handle: UnitHandle, effect: RunPlan) -> float | None:
    """The share of each of its GPUs that an engine holds that is up; more than it claims is logged.
    None where it cannot be seen."""
    held = sum((await held_before(drivers, handle)).values())
    if not held:
        return None
    totals = await drivers.gpu.totals()
    total = sum(totals.get(g, 0) for g in effect.gpus)
    share = ceil(1000 * held / total) / 1000 if total else None
    if share is not None:
        warn_of_claim(effect.config, share)
    return share


def warn_of_claim(config: ModelConfig, share: float) -> None:
    """CUDA graphs, contexts and NCCL's buffers come beside what vLLM is told to use."""
    if share > config.gpu_memory + CLAIM_SLACK:
        log.warning(
            "%s holds %.1f %% of its GPUs, and claims %.1f %%: set its gpu_memory to %.2f, or a"
            " model beside it finds too little",
            config.name,
            100 * share,
            100 * config.gpu_memory,
            ceil(100 * share) / 100,
            extra={"model": config.name},
        )


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
) -> int:
    """Return when the processes that held memory before hold no more than they may now: the bytes.
    What an engine that sleeps keeps differs by its kind (0.5 to 7 GiB were reported): one that gave
    back half and more is believed when no more comes."""
    if not gpu.available or not used_before:
        return 0
    allowed = await _allowed(gpu, effect)
    half = sum(used_before.values()) / 2 if allowed else 0.0
    now = asyncio.get_running_loop().time
    ends, last, changed_at = now() + deadline, -1, now()
    while True:
        used = sum(p.used_bytes for p in await gpu.processes() if p.pid in used_before)
        if used != last:
            last, changed_at = used, now()
        if used <= allowed or (used <= half and now() >= changed_at + SETTLED_SECS):
            return used
        if now() >= ends:
            raise MemoryNotReleased(
                "free",
                f'GPU memory of model "{effect.model}"',
                f"{used / 2**30:.1f} GiB still held after {deadline:g} s,"
                f" {allowed / 2**30:.1f} GiB expected",
                hint="the driver or the engine keeps it; see `nvidia-smi`",
            )
        await asyncio.sleep(POLL_SECS)


async def wait_for_room(gpu: GpuObserver, effect: RunPlan, *, held: int = 0) -> None:
    """Before a start or a wake: until each GPU has as much free as the engine will take beside the
    ``held`` bytes that it has there. A start compares that with the whole device, so that what a
    driver is late to release, or another program holds, fails it. What is missing after
    ``ROOM_SECS`` is logged with who holds it; the engine decides."""
    if not gpu.available:
        return
    part = held / max(len(effect.gpus), 1)

    def wanted(total: int) -> float:
        return total * effect.config.gpu_memory - part

    for short in await _seen_short(gpu, effect, wanted, ROOM_SECS):
        log.warning(
            "%s (stop other programs, or lower gpu_memory)", short, extra={"model": effect.model}
        )


async def require_room(gpu: GpuObserver, effect: RunPlan, needed: int, deadline: float) -> None:
    """Before the CUDA state of ``needed`` bytes comes back: until the GPUs have them free, at most
    ``ROOM_SECS`` and half of ``deadline``. Raises CheckpointFailed with who holds them: a resume
    that runs out of memory is final (cuda-checkpoint#44)."""
    target = f'model "{effect.model}"'
    if not gpu.available:
        log.info("resuming %s without a look at GPU memory: no NVML here", effect.model)
        return
    part = needed / max(len(effect.gpus), 1)
    for short in await _seen_short(gpu, effect, lambda _: part, min(ROOM_SECS, deadline / 2)):
        hint = "stop the other program; the engine would be lost by a resume without the memory"
        raise CheckpointFailed("resume", target, short, blame=Blame.HOST, hint=hint)


async def _seen_short(
    gpu: GpuObserver, effect: RunPlan, wanted: Callable[[int], float], patience: float
) -> list[str]:
    """Nothing once each GPU has free what is ``wanted``, of its total of so many bytes; after
    ``patience`` seconds, what each lacks and who has it. Nothing, too, where the GPUs do not show
    it: looking never stands before acting."""
    now = asyncio.get_running_loop().time
    ends = now() + patience
    try:
        async with asyncio.timeout(patience + LOOK_SECS):
            short = await _short_of_room(gpu, effect.gpus, wanted)
            while short and now() < ends:
                await asyncio.sleep(POLL_SECS)  # the driver has no event for it
                short = await _short_of_room(gpu, effect.gpus, wanted)
            return [
                f"GPU {index} has {free / 2**30:.1f} GiB free, and {effect.model} will ask for"
                f" {need / 2**30:.1f} GiB: {await _holders(gpu, index)}"
                for index, (free, need) in short.items()
            ]
    except (LlmuxError, OSError) as error:  # a TimeoutError is an OSError
        log.info(
            "cannot see the GPUs before the %s of %s: %s",
            effect.plan.kind,
            effect.model,
            str(error) or f"no answer within {patience + LOOK_SECS:g} s",
            extra={"model": effect.model},
        )
        return []


async def _short_of_room(
    gpu: GpuObserver, gpus: Sequence[int], wanted: Callable[[int], float]
) -> dict[int, tuple[float, float]]:
    """GPU index → (bytes free, bytes wanted), of those that have too little."""
    totals, used = await gpu.totals(), await gpu.used()
    rooms = {g: (totals[g] - used.get(g, 0), wanted(totals[g])) for g in gpus if g in totals}
    return {index: (free, need) for index, (free, need) in rooms.items() if free < need}


async def _holders(gpu: GpuObserver, index: int) -> str:
    held = [p for p in await gpu.processes() if p.gpu == index and p.used_bytes]
    most = sorted(held, key=lambda p: -p.used_bytes)[:3]
    named = (f"process {p.pid} holds {p.used_bytes / 2**30:.1f} GiB" for p in most)
    return ", ".join(named) or "no process is seen to hold it"


async def residue_share(gpu: GpuObserver, effect: RunPlan, held: int) -> float | None:
    """The share of each of its GPUs that a sleeping engine keeps; None when it keeps none by its
    way of parking, or all, or that was configured."""
    eviction = effect.plan.eviction
    keeps = eviction is not None and parked_share(effect.config, eviction) > 0
    asleep = keeps and not keeps_gpu(eviction) if eviction is not None else False
    if not asleep or not held or effect.config.gpu_memory_parked is not None:
        return None
    totals = await gpu.totals()
    total = sum(totals.get(g, 0) for g in effect.gpus)
    return ceil(1000 * held / total) / 1000 if total else None


async def _allowed(gpu: GpuObserver, effect: RunPlan) -> float:
    eviction = effect.plan.eviction
    if effect.plan.success is Outcome.DOWN or eviction is None:
        return 0.0
    share = parked_share(effect.config, eviction)
    return _bytes_of(share, effect.gpus, await gpu.totals())


def _bytes_of(share: float, gpus: Sequence[int], totals: Mapping[int, int]) -> float:
    return sum(totals.get(g, 0) * share + SLACK_BYTES for g in gpus)
