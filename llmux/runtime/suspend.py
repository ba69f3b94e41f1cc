"""An engine's CUDA state into host memory and back, as steps of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from llmux.core.plans import Step
from llmux.errors import CheckpointFailed, Unsupported
from llmux.ports import UnitHandle
from llmux.runtime.drivers import Drivers
from llmux.runtime.instance import Instance


async def suspend(drivers: Drivers, handle: UnitHandle, instance: Instance, step: Step) -> None:
    """``instance.used_before`` is what it holds now. Raises CheckpointFailed, and Unsupported
    where there is no CUDA and the step needs one."""
    cuda, target = drivers.cuda, f'model "{instance.config.name}"'
    if cuda is None:
        if step.if_any:
            return
        raise Unsupported("suspend", target, "there is no CUDA driver here")
    pids = await drivers.units.pids(handle)
    await cuda.check_memory(pids, sum(instance.used_before.values()))
    instance.cuda_pids = tuple(await cuda.suspend(pids, step.deadline))
    if not instance.cuda_pids and not step.if_any:
        text = "none of its processes uses CUDA, so nothing would be freed"
        raise CheckpointFailed("suspend", target, text)


async def resume(drivers: Drivers, instance: Instance, step: Step) -> None:
    """Whose state it was is in the image's recipe or in the notes; a supervisor that ended before
    it noted that down leaves all processes of the engine to be asked."""
    if drivers.cuda is None:
        return
    pids: Sequence[int] = instance.cuda_pids
    if not pids and not step.if_any and instance.handle is not None:
        pids = await drivers.units.pids(instance.handle)
    if pids:
        await drivers.cuda.resume(pids, step.deadline)
        instance.cuda_pids = ()
