"""What each step of a plan does, with the drivers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from llmux.core.effects import RunPlan
from llmux.core.events import AwakeSeen, Event, GpuReleased, ResidueSeen
from llmux.core.plans import Step, StepKind
from llmux.errors import EngineUnhealthy, LlmuxError
from llmux.ports import Canary, UnitHandle
from llmux.protocol import Address
from llmux.runtime.engines.canary import compare
from llmux.runtime.engines.cuda import (
    discard_cache,
    leave_gpu,
    resume,
    return_cache,
    suspend,
)
from llmux.runtime.engines.gpu_memory import (
    awake_share,
    held_before,
    residue_share,
    verify_release,
    wait_for_room,
)
from llmux.runtime.engines.images import ImageLifecycle, TakeOver
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.launch import (
    engine_address,
    launch_digest,
    refuse_strangers,
    require_model,
    require_whole_gpus,
    warn_about,
)
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

# Host memory that a model takes while it comes up; vLLM's processes have 3 to 5 GiB.
ROOM_BYTES = 4 << 30
LOOK_SECS = 3.0  # for the driver to say which processes have CUDA state: mostly milliseconds


class Steps:
    """``take_over`` gives the engine that was restored ahead; ``on_exit`` is called when the root
    process of an engine ends; ``tell`` takes to the core what was seen of its GPU memory on the
    way."""

    def __init__(
        self,
        drivers: Drivers,
        images: ImageLifecycle,
        take_over: TakeOver,
        on_exit: Callable[[UnitHandle, str], None],
        tell: Callable[[Event], None],
    ) -> None:
        self._drivers = drivers
        self._images = images
        self._take_over = take_over
        self._on_exit = on_exit
        self._tell = tell

    @staticmethod
    def is_void(step: Step, instance: Instance) -> bool:
        """Whether the step has nothing to do for this engine: a plan is made without knowing what
        its engine was through. Such a step is neither told of nor measured."""
        match step.kind:
            case StepKind.DISCARD_CACHE:
                return not instance.config.engine_type.discards_cache(instance.facts.version or "")
            case StepKind.RETURN_CACHE:
                return not instance.facts.cache_discarded or instance.handle is None
            case StepKind.LEAVE_GPU:
                return not instance.facts.resumed or instance.handle is None
            case _:
                return False

    async def run(self, step: Step, effect: RunPlan, instance: Instance) -> None:
        drivers, deadline = self._drivers, step.deadline
        match step.kind:
            case StepKind.SPAWN:
                await self._start_engine(effect, instance, deadline)
            case StepKind.WAIT_HEALTHY:
                address = self._address(instance)
                await drivers.engine.wait_healthy(address, deadline)
                await refuse_strangers(drivers, effect.model, address, instance.handle)
            case StepKind.DESCRIBE:
                await self._describe(effect, instance, deadline)
            case StepKind.CANARY_RECORD:
                canary = await self.ask_canary(instance, deadline)
                instance.facts = replace(instance.facts, canary=canary)
            case StepKind.CANARY_SAMPLE:
                address = self._address(instance)
                await drivers.engine.sample(address, instance.config.name, deadline)
            case StepKind.CANARY_CHECK:
                await self._check_canary(instance, deadline)
            case StepKind.SLEEP:
                await self._note_memory(instance)
                await drivers.engine.sleep(self._address(instance), step.level, deadline)
            case StepKind.WAKE_UP:
                await self._look_for_room(step, effect, instance)
                await drivers.engine.wake(self._address(instance), step.tags, deadline)
            case StepKind.RELOAD_WEIGHTS:
                await drivers.engine.reload_weights(self._address(instance), deadline)
            case StepKind.RESET_PREFIX_CACHE:
                await drivers.engine.reset_prefix_cache(self._address(instance), deadline)
            case StepKind.DISCARD_CACHE:
                await discard_cache(drivers, self._address(instance), instance, step)
            case StepKind.RETURN_CACHE:
                await return_cache(drivers, effect, self._address(instance), instance, step)
            case StepKind.COMM_SUSPEND | StepKind.COMM_RESUME:
                await self._communicators(step, self._address(instance))
            case StepKind.CUDA_SUSPEND:
                await self._note_memory(instance)
                await suspend(drivers, self._handle(instance), instance, step)
            case StepKind.CUDA_RESUME:
                await resume(drivers, effect, instance, step)
            case StepKind.LEAVE_CLAIM:
                await self._leave_claim(effect, instance, deadline)
            case StepKind.DUMP:
                await self._note_memory(instance)
                assert effect.plan.eviction is not None
                await self._images.dump(instance, effect.plan.eviction, deadline)
            case StepKind.RESTORE:
                image = await self._images.restore(instance, effect.gpus, deadline, self._take_over)
                instance.image = image
                self._follow(instance)
            case StepKind.FREEZE:
                await drivers.freezer.freeze(self._handle(instance), deadline)
            case StepKind.THAW:
                await drivers.freezer.thaw(self._handle(instance), deadline)
            case StepKind.TERMINATE:
                await self._terminate(instance, deadline)
            case StepKind.LEAVE_GPU:
                await self._leave_gpu(step, instance)
            case StepKind.KILL:
                await self._kill(instance, deadline)
            case StepKind.VERIFY_RELEASE:
                await self._verify_release(effect, instance, deadline)

    async def _describe(self, effect: RunPlan, instance: Instance, deadline: float) -> None:
        about = await self._drivers.engine.describe(self._address(instance), deadline)
        instance.facts = replace(
            instance.facts,
            max_model_len=about.get("max_model_len"),
            version=about.get("version"),
        )
        warn_about(effect.config, instance.facts.version)
        await self._look_for_obstacles(effect, instance)

    async def _communicators(self, step: Step, address: Address) -> None:
        up = step.kind is StepKind.COMM_RESUME
        await self._drivers.engine.communicators(address, up=up, deadline=step.deadline)

    async def _leave_gpu(self, step: Step, instance: Instance) -> None:
        await self._note_memory(instance)
        await leave_gpu(self._drivers, self._handle(instance), instance, step)

    async def _terminate(self, instance: Instance, deadline: float) -> None:
        await self._note_memory(instance)
        # with its CUDA state away the engine would wait for it until the kill
        if instance.handle is not None and not instance.facts.cuda_pids:
            await self._drivers.units.terminate(instance.handle, deadline)

    async def _verify_release(self, effect: RunPlan, instance: Instance, deadline: float) -> None:
        gpu = self._drivers.gpu
        if not instance.used_before:  # adopted in the middle of its parking
            await self._note_memory(instance)
        held = await verify_release(gpu, effect, instance.used_before, deadline)
        share = await residue_share(gpu, effect, held)
        if share is not None:
            self._tell(ResidueSeen(effect.model, effect.op, share))

    async def _start_engine(self, effect: RunPlan, instance: Instance, deadline: float) -> None:
        config = effect.config
        instance.forget()
        require_model(config)
        spec = self._images.spec(config, effect.gpus)
        require_whole_gpus(config, spec.env)
        address = engine_address(config, self._drivers.places)
        identity = await asyncio.to_thread(self._drivers.identity, config, spec)
        digest = launch_digest(config, effect.gpus, self._drivers.places)
        instance.facts = replace(
            instance.facts, address=address, identity=identity, started_as=digest
        )
        await refuse_strangers(self._drivers, config.name, address, None)
        if self._drivers.cuda_started is not None:
            await self._drivers.cuda_started()
        await wait_for_room(self._drivers.gpu, effect)
        if self._drivers.checkpointer is not None:
            await self._drivers.checkpointer.free_shm(config.name)
        log.info("Spawning vLLM process", extra={"model": config.name})
        instance.handle = await self._drivers.units.start(spec, deadline)
        self._follow(instance)

    def _follow(self, instance: Instance) -> None:
        """Follow the engine's output and exit."""
        handle = self._handle(instance)
        self._drivers.output.attach(handle)
        self._drivers.units.watch(handle, self._on_exit)

    async def _kill(self, instance: Instance, deadline: float) -> None:
        handle = instance.handle
        if handle is None:
            return
        if not instance.used_before:
            await self._note_memory(instance)
        self._drivers.units.unwatch(handle)
        checkpointer = self._drivers.checkpointer
        # a killed engine leaves its files in /dev/shm
        leftovers = await checkpointer.shm_names(handle) if checkpointer is not None else ()
        await self._drivers.units.kill(handle, deadline)
        if checkpointer is not None:
            await checkpointer.remove_shm(instance.config.name, leftovers)
            await checkpointer.confirm_restore(instance.config.name)
        self._drivers.output.detach(instance.config.name)
        instance.handle = None

    async def _look_for_obstacles(self, effect: RunPlan, instance: Instance) -> None:
        """Say right after its start, not only at its first eviction, why no image can be made."""
        checkpointer, cuda = self._drivers.checkpointer, self._drivers.cuda
        if checkpointer is None or instance.handle is None or not effect.config.makes_images:
            return
        suspendable: Sequence[int] | None = None
        if cuda is not None:
            pids = await self._drivers.units.pids(instance.handle)
            with suppress(LlmuxError):  # then devices are judged at the dump
                suspendable = await cuda.suspendable(pids, LOOK_SECS)
        if (obstacle := await checkpointer.obstacle(instance.handle, suspendable)) is not None:
            log.warning(
                "%s cannot be checkpointed as it is now, and would stay in host memory: %s",
                effect.model,
                obstacle,
                extra={"model": effect.model, "reason": obstacle},
            )

    async def _leave_claim(self, effect: RunPlan, instance: Instance, deadline: float) -> None:
        """With its CUDA state in host memory the engine needs no GPU to become an image. Without
        the memory for both, the next model waits for the image, as it does without CUDA state."""
        if not instance.facts.cuda_pids:
            return
        look = self._drivers.available_memory
        if look is not None and (available := look()) < ROOM_BYTES:
            log.info(
                "%s keeps its GPU until its image is written: MemAvailable is %.1f GiB, and the"
                " next model may need %.1f GiB beside it",
                effect.model,
                available / 2**30,
                ROOM_BYTES / 2**30,
                extra={"model": effect.model},
            )
            return
        await verify_release(self._drivers.gpu, effect, instance.used_before, deadline)
        self._tell(GpuReleased(effect.model, effect.op))

    async def _look_for_room(self, step: Step, effect: RunPlan, instance: Instance) -> None:
        """Before the first part of what a sleep gave back comes again; what follows is its own."""
        if step is next(one for one in effect.plan.steps if one.kind is StepKind.WAKE_UP):
            held = await held_before(self._drivers, self._handle(instance))
            await wait_for_room(self._drivers.gpu, effect, held=sum(held.values()))

    async def learn_awake(self, effect: RunPlan, instance: Instance) -> None:
        """Tell the core what the engine holds that is up: seen in half a second, or not at all."""
        with suppress(LlmuxError):
            share = await awake_share(self._drivers, self._handle(instance), effect)
            if share is not None:
                self._tell(AwakeSeen(effect.model, effect.op, share))

    async def _note_memory(self, instance: Instance) -> None:
        """Record GPU memory per process, to verify its release later."""
        handle = instance.handle
        instance.used_before = {} if handle is None else await held_before(self._drivers, handle)

    async def ask_canary(self, instance: Instance, deadline: float) -> Canary:
        return await self._drivers.engine.canary(
            self._address(instance), instance.config.name, deadline
        )

    async def _check_canary(self, instance: Instance, deadline: float) -> None:
        answer = await self.ask_canary(instance, deadline)
        expected = instance.facts.canary or answer  # adopted without one: compare from now on
        instance.facts = replace(instance.facts, canary=expected)
        compare(instance.config.name, expected, answer)

    def _address(self, instance: Instance) -> Address:
        if instance.facts.address is None:
            raise EngineUnhealthy("reach", f'model "{instance.config.name}"', "it has no engine")
        return instance.facts.address

    def _handle(self, instance: Instance) -> UnitHandle:
        if instance.handle is None:
            raise EngineUnhealthy("act on", f'model "{instance.config.name}"', "it has no unit")
        return instance.handle
