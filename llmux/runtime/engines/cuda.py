"""Suspend an engine's CUDA state into host memory and resume it, as steps of a plan; the KV cache
that is not worth it goes before and comes after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Final

from llmux.core.effects import RunPlan
from llmux.core.plans import Step
from llmux.errors import CheckpointFailed, EngineUnhealthy, LlmuxError, Unsupported
from llmux.ports import UnitHandle
from llmux.protocol import Address
from llmux.runtime.engines.gpu_memory import held_before, require_room, wait_for_room
from llmux.runtime.engines.instance import Instance
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

LEAVE_SLEEP_SECS: Final = 5.0  # it is idle, and what it unmaps goes nowhere: measured 40 ms
REFUSED: Final = range(400, 500)  # the route or its arguments are not known: nothing was done


async def suspend(drivers: Drivers, handle: UnitHandle, instance: Instance, step: Step) -> None:
    """``instance.used_before`` is what it holds now. Raises CheckpointFailed, and Unsupported
    where there is no CUDA and the step needs one."""
    cuda, target = drivers.cuda, f'model "{instance.config.name}"'
    if cuda is None:
        if step.if_any:
            return
        raise Unsupported("suspend", target, "there is no CUDA driver here")
    pids = await drivers.units.pids(handle)
    held = sum(instance.used_before.values())
    await cuda.check_memory(pids, held)
    suspended = tuple(await cuda.suspend(pids, step.deadline))
    instance.facts = replace(instance.facts, cuda_pids=suspended, cuda_bytes=held)
    if not suspended and not step.if_any:
        text = "none of its processes uses CUDA, so nothing would be freed"
        raise CheckpointFailed("suspend", target, text)


async def resume(drivers: Drivers, effect: RunPlan, instance: Instance, step: Step) -> None:
    """Resume the processes named by the image's recipe or the notes, once there is room for what
    they held. A supervisor that ended before it wrote them down leaves none: then all processes of
    the engine are asked."""
    if drivers.cuda is None:
        return
    pids: Sequence[int] = instance.facts.cuda_pids
    if not pids and not step.if_any and instance.handle is not None:
        pids = await drivers.units.pids(instance.handle)
    if pids and instance.handle is not None:
        began = monotonic()
        needed = await _missing(drivers, instance, instance.handle)
        await require_room(drivers.gpu, effect, needed, step.deadline)
        # Before the call: one that fails half-way has brought some of it back.
        instance.facts = replace(instance.facts, resumed=True, cuda_pids=())
        await drivers.cuda.resume(pids, step.deadline - (monotonic() - began))


async def _missing(drivers: Drivers, instance: Instance, handle: UnitHandle) -> int:
    """Bytes that a resume will bring back: some may be there, when it was begun before."""
    here = await held_before(drivers, handle)
    return max(0, instance.facts.cuda_bytes - sum(here.values()))


async def leave_gpu(drivers: Drivers, handle: UnitHandle, instance: Instance, step: Step) -> None:
    """Suspend an engine whose CUDA state was resumed, since it ends next; at the step's ``level``
    of sleep, if it has one. The driver has seen its state in host memory then; a failure is the
    caller's to ignore."""
    if drivers.cuda is None or instance.facts.cuda_pids:
        return
    ends = monotonic() + step.deadline
    if await drivers.freezer.frozen(handle):
        await drivers.freezer.thaw(handle, step.deadline)  # frozen threads cannot be locked
    if step.level and instance.facts.address is not None:
        await _sleep_first(drivers, instance.facts.address, handle, instance, step.level)
    left = max(0.0, ends - monotonic())
    await suspend(drivers, handle, instance, replace(step, deadline=left, if_any=True))


async def _sleep_first(
    drivers: Drivers, address: Address, handle: UnitHandle, instance: Instance, level: int
) -> None:
    """What it still holds is what the suspend will move. One that does not sleep moves all."""
    try:
        await drivers.engine.sleep(address, level, LEAVE_SLEEP_SECS)
    except (LlmuxError, OSError) as error:  # a TimeoutError is an OSError
        log.info(
            "%s leaves its GPU awake: %s",
            instance.config.name,
            str(error) or f"no sleep within {LEAVE_SLEEP_SECS:g} s",
            extra={"model": instance.config.name},
        )
        return
    held = await held_before(drivers, handle)
    instance.used_before = {pid: held.get(pid, 0) for pid in instance.used_before}


async def discard_cache(drivers: Drivers, address: Address, instance: Instance, step: Step) -> None:
    """Before the suspend of a retained engine: most of what it holds is blocks of prompts that no
    client asks for again. Raises what the engine did instead; it then keeps its cache or, where
    that is not known, is taken to have none."""
    # First, and not after it came back: a block found by its prompt must never be one without data.
    await drivers.engine.reset_prefix_cache(address, step.deadline)
    # Before the call: one that fails half-way has unmapped some of it.
    instance.facts = replace(instance.facts, cache_discarded=True)
    try:
        await drivers.engine.discard_cache(address, step.deadline)
    except EngineUnhealthy as error:
        if error.fields.get("status") in REFUSED:
            instance.facts = replace(instance.facts, cache_discarded=False)
        log.info(
            "%s keeps its KV cache: %s",
            instance.config.name,
            error,
            extra={"model": instance.config.name},
        )
        raise


async def return_cache(
    drivers: Drivers, effect: RunPlan, address: Address, instance: Instance, step: Step
) -> None:
    """After the resume, once there is room for it."""
    handle = instance.handle
    assert handle is not None  # else the step is void
    held = await held_before(drivers, handle)
    await wait_for_room(drivers.gpu, effect, held=sum(held.values()))
    await drivers.engine.return_cache(address, step.deadline)
    instance.facts = replace(instance.facts, cache_discarded=False)
