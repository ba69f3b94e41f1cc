"""Runs plans: one operation per model at a time, every step under its deadline.

Owns what is known of the engines' instances (unit, address, canary). Decides nothing: it reports
how an operation ended, as observed, and the core draws the conclusions. Operations are never
cancelled half-way by a request or an operator; they end by their deadlines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from time import monotonic
from typing import Any

from llmux.config.schema import ModelConfig
from llmux.core.effects import DropAhead, Probe, ReadAhead, RestoreAhead, RunPlan
from llmux.core.events import EngineExited, Event, OperationFinished, ProbeFinished
from llmux.core.plans import PROBE_SECS, Outcome, Step, StepKind
from llmux.errors import (
    DriverTimeout,
    EngineUnhealthy,
    LlmuxError,
)
from llmux.ports import Canary, Dumper, Image, UnitHandle
from llmux.protocol import Address
from llmux.runtime.ahead import Ahead
from llmux.runtime.canary import compare
from llmux.runtime.drivers import Drivers
from llmux.runtime.imaging import Imaging
from llmux.runtime.instance import Instance
from llmux.runtime.launch import engine_address, remove_stale_socket, warn_about
from llmux.runtime.release import held_by, verify_release
from llmux.runtime.suspend import resume, suspend

log = logging.getLogger("llmux")

# A driver keeps the step's deadline itself; this much later it is taken to hang.
BACKSTOP_SECS = 2.0
# Ends of the engine that these steps cause, or do not mind.
MAY_DIE = frozenset(
    {StepKind.SPAWN, StepKind.TERMINATE, StepKind.KILL, StepKind.VERIFY_RELEASE, StepKind.DUMP}
)
TAIL_LINES = 12


class Executor:
    """``post`` takes the events back to the loop; ``on_phase`` is told every finished step."""

    def __init__(
        self,
        drivers: Drivers,
        post: Callable[[Event], None],
        on_phase: Callable[[str, StepKind, float, str], None],
    ) -> None:
        self._drivers = drivers
        self._post = post
        self._on_phase = on_phase
        self._tasks: set[asyncio.Task[None]] = set()
        self.imaging = Imaging(drivers, post)
        self.ahead = Ahead(drivers, self.imaging)
        self.instances: dict[str, Instance] = {}

    def instance(self, config: ModelConfig) -> Instance:
        found = self.instances.setdefault(config.name, Instance(config))
        found.config = config
        return found

    def run(self, effect: RunPlan) -> None:
        self._spawn(self._operation(effect), f"{effect.plan.name} {effect.model}")

    def read_ahead(self, effect: ReadAhead) -> None:
        self.imaging.read_ahead(effect.config, effect.gpus)

    def restore_ahead(self, effect: RestoreAhead) -> None:
        going = (self.instances[name].handle for name in effect.into_ram if name in self.instances)
        self.ahead.begin(effect, [handle for handle in going if handle is not None])

    def drop_ahead(self, effect: DropAhead) -> None:
        self.ahead.drop(effect.model)

    def probe(self, effect: Probe) -> None:
        self._spawn(self._probe(effect), f"probe {effect.model}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def adopt(self, config: ModelConfig, handle: UnitHandle, address: Address) -> Instance:
        """An engine that a former supervisor started."""
        instance = self.instance(config)
        instance.handle, instance.address = handle, address
        self._drivers.output.attach(handle)
        self._drivers.units.watch(handle, self._exited)
        return instance

    async def close(self) -> None:
        """Stop working on operations; engines are left as they are, for whoever adopts them. Those
        that were restored ahead serve nobody and are ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ahead.close()

    # ---- operations -----------------------------------------------------------------------------

    async def _operation(self, effect: RunPlan) -> None:
        instance = self.instance(effect.config)
        instance.gpus = effect.gpus or instance.gpus
        instance.phases = []
        instance.image = None
        loop = asyncio.get_running_loop()
        instance.died = loop.create_future()
        if effect.plan.name == "start":
            log.info(
                "Starting %s cold (no checkpoint available)",
                effect.model,
                extra={"model": effect.model},
            )
        began = monotonic()
        outcome, detail = await self._steps(effect, instance)
        if effect.plan.name == "start" and outcome is Outcome.UP:
            instance.cold_seconds = monotonic() - began
        died, instance.died = instance.died, None
        self._post(OperationFinished(effect.model, effect.op, outcome, detail))
        if died.done() and instance.handle is not None and outcome is not Outcome.DOWN:
            self._post(EngineExited(effect.model, died.result()))
        if outcome is Outcome.DOWN:
            instance.handle = None

    async def _steps(self, effect: RunPlan, instance: Instance) -> tuple[Outcome, str]:
        plan = effect.plan
        detail = ""
        try:
            if not plan.restores:
                await self.ahead.dropped(effect.model)
            plan = await self.imaging.shorten(plan, instance)
            for step in plan.steps:
                await self._step(step, effect, instance)
            if instance.image is not None and plan.success is Outcome.UP:
                await self.imaging.served(instance.image)
        except LlmuxError as error:
            detail = str(error)
        except OSError as error:
            detail = f"cannot {plan.name} model {effect.model!r}: {error}"
        else:
            return plan.success, ""
        if instance.image is not None:
            # it was restored, and then did not answer as before
            await self._distrust(instance.image, detail)
        log.warning(
            "cannot %s %s: %s",
            plan.name,
            effect.model,
            detail,
            extra={"model": effect.model, "reason": detail},
        )
        try:
            await self.ahead.dropped(effect.model)
            # a plan without a way back of its own is itself the last rung: once more, without mercy
            for step in plan.fallback or plan.steps[-2:]:
                await self._step(step, effect, instance)
        except (LlmuxError, OSError) as error:
            log.error(
                "cannot clean up %s: %s",
                effect.model,
                error,
                extra={"model": effect.model, "reason": str(error)},
            )
            return Outcome.STUCK, f"{detail}; then {error}"
        return Outcome.DOWN, detail

    async def _step(self, step: Step, effect: RunPlan, instance: Instance) -> None:
        began = monotonic()
        result = "ok"
        instance.tell(step.kind)
        try:
            async with asyncio.timeout(step.deadline + BACKSTOP_SECS):
                await self._or_death(step, self._do(step, effect, instance), instance)
        except TimeoutError:
            result = "timeout"
            message = f"not done after {step.deadline:g} s, outcome unknown"
            if not step.optional:
                raise DriverTimeout(step.kind, effect.model, message) from None
        except LlmuxError as error:
            result = "timeout" if isinstance(error, DriverTimeout) else "failed"
            if not step.optional:
                raise
            log.debug("%s %s: %s", step.kind, effect.model, error, extra={"model": effect.model})
        finally:
            seconds = monotonic() - began
            instance.phases.append((step.kind, seconds))
            self._on_phase(effect.model, step.kind, seconds, result)

    async def _or_death(
        self, step: Step, work: Coroutine[Any, Any, None], instance: Instance
    ) -> None:
        """Do the step, unless the engine dies under it."""
        died = instance.died
        if step.kind in MAY_DIE or died is None:
            await work
            return
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, died}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise EngineUnhealthy(
                    "use", f'engine of model "{instance.config.name}"', self._death(instance, died)
                )
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _distrust(self, image: Image, reason: str) -> None:
        try:
            await self.imaging.distrust(image, reason)
        except (LlmuxError, OSError) as error:
            log.error("cannot quarantine the image of %s: %s", image.model, error)

    def _death(self, instance: Instance, died: asyncio.Future[str]) -> str:
        return f"it died: {self._with_last_lines(instance.config.name, died.result())}"

    def _with_last_lines(self, model: str, description: str) -> str:
        tail = self._drivers.output.tail(model, TAIL_LINES)
        return description + ("; its last lines:\n" + "\n".join(tail) if tail else "")

    def _exited(self, handle: UnitHandle, description: str) -> None:
        instance = self.instances.get(handle.model)
        if instance is None or instance.handle != handle:
            return
        if instance.died is None:
            text = self._with_last_lines(handle.model, description)
            self._post(EngineExited(handle.model, text))
        elif not instance.died.done():
            instance.died.set_result(description)

    # ---- steps ----------------------------------------------------------------------------------

    async def _do(self, step: Step, effect: RunPlan, instance: Instance) -> None:
        drivers, deadline = self._drivers, step.deadline
        match step.kind:
            case StepKind.SPAWN:
                await self._start_engine(effect, instance, deadline)
            case StepKind.WAIT_HEALTHY:
                await drivers.engine.wait_healthy(self._address(instance), deadline)
            case StepKind.DESCRIBE:
                about = await drivers.engine.describe(self._address(instance), deadline)
                instance.max_model_len = about.get("max_model_len")
                instance.version = about.get("version")
                warn_about(effect.config, instance.version)
            case StepKind.CANARY_RECORD:
                instance.canary = await self.ask_canary(instance, deadline)
            case StepKind.CANARY_CHECK:
                await self._check_canary(instance, deadline)
            case StepKind.SLEEP:
                await self._note_memory(instance)
                await drivers.engine.sleep(self._address(instance), step.level, deadline)
            case StepKind.WAKE_UP:
                await drivers.engine.wake(self._address(instance), step.tags, deadline)
            case StepKind.RELOAD_WEIGHTS:
                await drivers.engine.reload_weights(self._address(instance), deadline)
            case StepKind.RESET_PREFIX_CACHE:
                await drivers.engine.reset_prefix_cache(self._address(instance), deadline)
            case StepKind.COMM_SUSPEND | StepKind.COMM_RESUME:
                up = step.kind is StepKind.COMM_RESUME
                address = self._address(instance)
                await drivers.engine.communicators(address, up=up, deadline=deadline)
            case StepKind.CUDA_SUSPEND:
                await self._note_memory(instance)
                await suspend(drivers, self._handle(instance), instance, step)
            case StepKind.CUDA_RESUME:
                await resume(drivers, instance, step)
            case StepKind.DUMP:
                await self._note_memory(instance)
                assert effect.plan.eviction is not None
                await self.imaging.dump(instance, effect.plan.eviction, deadline)
            case StepKind.RESTORE:
                image = await self.imaging.restore(instance, effect.gpus, deadline, self.ahead.take)
                instance.image = image
                self._follow(instance)
            case StepKind.FREEZE:
                await drivers.freezer.freeze(self._handle(instance), deadline)
            case StepKind.THAW:
                await drivers.freezer.thaw(self._handle(instance), deadline)
            case StepKind.TERMINATE:
                await self._note_memory(instance)
                # one whose CUDA state is away would wait for it in its shutdown, until the kill
                if instance.handle is not None and not instance.cuda_pids:
                    await drivers.units.terminate(instance.handle, deadline)
            case StepKind.KILL:
                await self._kill(instance, deadline)
            case StepKind.VERIFY_RELEASE:
                await verify_release(drivers.gpu, effect, instance.used_before, deadline)

    async def _start_engine(self, effect: RunPlan, instance: Instance, deadline: float) -> None:
        config = effect.config
        instance.forget()
        spec = self.imaging.spec(config, effect.gpus)
        instance.address = engine_address(config, self._drivers.places)
        instance.identity = await asyncio.to_thread(self._drivers.identity, config, spec)
        remove_stale_socket(instance.address)
        log.info("Spawning vLLM process", extra={"model": config.name})
        instance.handle = await self._drivers.units.start(spec, deadline)
        self._follow(instance)

    def _follow(self, instance: Instance) -> None:
        """Hear of its output and of its end."""
        handle = self._handle(instance)
        self._drivers.output.attach(handle)
        self._drivers.units.watch(handle, self._exited)

    async def _kill(self, instance: Instance, deadline: float) -> None:
        handle = instance.handle
        if handle is None:
            return
        if not instance.used_before:
            await self._note_memory(instance)
        self._drivers.units.unwatch(handle)
        dumper = self._drivers.dumper
        # what a killed engine leaves in /dev/shm nobody else removes
        litter = await dumper.shm_names(handle) if dumper is not None else ()
        await self._drivers.units.kill(handle, deadline)
        if dumper is not None:
            await dumper.remove_shm(litter)
            await dumper.settle(instance.config.name)
        self._drivers.output.detach(instance.config.name)
        instance.handle = None

    async def _note_memory(self, instance: Instance) -> None:
        """Who of this engine held how much, so that its going can be seen."""
        engine = (instance.handle,) if instance.handle is not None else ()
        instance.used_before = await held_by(self._drivers, *engine)

    # ---- verification ---------------------------------------------------------------------------

    async def ask_canary(self, instance: Instance, deadline: float) -> Canary:
        return await self._drivers.engine.canary(
            self._address(instance), instance.config.name, deadline
        )

    async def _check_canary(self, instance: Instance, deadline: float) -> None:
        answer = await self.ask_canary(instance, deadline)
        if instance.canary is None:
            instance.canary = answer  # adopted without one: from here on it can be compared
        compare(instance.config.name, instance.canary, answer)

    async def _probe(self, effect: Probe) -> None:
        instance = self.instance(effect.config)
        # as long as a client's silence is borne, and no longer than it takes under any load
        patience = min(PROBE_SECS, effect.config.stall_timeout_secs or PROBE_SECS)
        error: str | None = None
        try:
            async with asyncio.timeout(patience + BACKSTOP_SECS):
                await self.ask_canary(instance, patience)
        except TimeoutError:
            error = f"no answer to a probe within {patience:g} s"
        except LlmuxError as failure:
            error = str(failure)
        self._post(ProbeFinished(effect.model, effect.epoch, error))

    # ---- small things ---------------------------------------------------------------------------

    def _address(self, instance: Instance) -> Address:
        if instance.address is None:
            raise EngineUnhealthy("reach", f'model "{instance.config.name}"', "it has no engine")
        return instance.address

    def _handle(self, instance: Instance) -> UnitHandle:
        if instance.handle is None:
            raise EngineUnhealthy("act on", f'model "{instance.config.name}"', "it has no unit")
        return instance.handle

    @property
    def dumper(self) -> Dumper | None:
        """For who looks at images; what makes and uses them is in plans."""
        return self._drivers.dumper

    async def gpu_bytes(self, handle: UnitHandle) -> int | None:
        """GPU memory of the unit's processes; None where it cannot be seen."""
        if not self._drivers.gpu.available:
            return None
        return sum((await held_by(self._drivers, handle)).values())

    async def gpu_totals(self) -> Mapping[int, int]:
        return await self._drivers.gpu.totals()

    def notes(self, name: str) -> dict[str, Any]:
        """What a next supervisor needs to know of the instance."""
        instance = self.instances.get(name)
        return {} if instance is None else instance.notes()
