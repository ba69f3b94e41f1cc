"""Runs plans: one operation per model at a time, every step under its deadline.

Owns what is known of the engines' instances (unit, address, canary). Decides nothing: it reports
how an operation ended, as observed, and the core draws the conclusions. Operations are never
cancelled half-way by a request or an operator; they end by their deadlines. Whatever exception a
step raises, the operation goes down its ladder and ends with exactly one OperationFinished.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from llmux.config.schema import Eviction, ModelConfig
from llmux.core.effects import DropAhead, Probe, RestoreAhead, RunPlan
from llmux.core.events import EngineExited, Event, OperationFinished, ProbeFinished
from llmux.core.plans import Outcome, PlanKind, Step, StepKind
from llmux.core.records import ModelRecord
from llmux.errors import Blame, CheckpointFailed, DriverTimeout, EngineUnhealthy, LlmuxError
from llmux.image_ports import Image
from llmux.ports import UnitHandle
from llmux.runtime.engines.deaths import behind_answer, with_cause
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.host_memory import host_bytes
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.launch import launch_digest, refuse_strangers
from llmux.runtime.engines.other_plans import fitting, without_image
from llmux.runtime.engines.restore_ahead import AheadRestorer
from llmux.runtime.engines.steps import Steps
from llmux.runtime.engines.vitals import Watch
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

# A driver keeps the step's deadline itself; this much later it is taken to hang.
BACKSTOP_SECS = 2.0
# For an operation that is given up: a half-made unit or a half-restored tree is ended on the way.
GIVE_UP_SECS = 20.0
# For what comes before a plan's first step: an engine restored ahead ends, an image is looked for.
PREPARE_SECS = 60.0
# The engine may end during these steps: they cause it, or do not need it.
MAY_DIE = frozenset(
    {StepKind.SPAWN, StepKind.TERMINATE, StepKind.KILL, StepKind.VERIFY_RELEASE, StepKind.DUMP}
)


@dataclass(frozen=True, slots=True)
class _Ended:
    """How an operation ended. ``eviction``: how it is parked, when the plan says otherwise."""

    outcome: Outcome
    detail: str = ""
    eviction: Eviction | None = None


class Executor:
    """``post`` takes events back to the loop; ``on_phase`` is called with every finished step."""

    def __init__(
        self,
        drivers: Drivers,
        images: ImageLifecycle,
        post: Callable[[Event], None],
        on_phase: Callable[[str, StepKind, float, str], None],
    ) -> None:
        self._drivers = drivers
        self._post = post
        self._on_phase = on_phase
        self._tasks: set[asyncio.Task[None]] = set()
        self._operations: dict[str, asyncio.Task[None]] = {}  # the newest per model
        self._images = images
        self.read_ahead = images.read_ahead
        self.read_weights = images.read_weights
        self.end_reading = images.end_reading
        self.ahead = AheadRestorer(drivers, images)
        self.steps = Steps(drivers, images, self.ahead.take, self._exited, post)
        self.instances: dict[str, Instance] = {}

    def instance(self, config: ModelConfig) -> Instance:
        """The model's instance; made with ``config`` when there is none yet."""
        return self.instances.setdefault(config.name, Instance(config))

    def stale(self, record: ModelRecord) -> bool:
        """True when the engine was started otherwise than the configuration now says."""
        instance = self.instances.get(record.config.name)
        if instance is None or instance.handle is None or instance.facts.started_as is None:
            return False
        config, gpus = record.config, instance.facts.gpus or record.gpus
        wanted = instance.wanted
        if wanted is None or wanted[0] is not config or wanted[1] != gpus:
            wanted = (config, gpus, launch_digest(config, gpus, self._drivers.places))
            instance.wanted = wanted
        return wanted[2] != instance.facts.started_as

    def run(self, effect: RunPlan) -> None:
        former = self._operations.get(effect.model)
        work = self._operation(effect, former)
        task = self._spawn(work, f"{effect.plan.kind} {effect.model}")
        self._operations[effect.model] = task

    def restore_ahead(self, effect: RestoreAhead) -> None:
        going = (self.instances[name].handle for name in effect.into_ram if name in self.instances)
        self.ahead.begin(effect, [handle for handle in going if handle is not None])

    def drop_ahead(self, effect: DropAhead) -> None:
        self.ahead.drop(effect.model)

    def probe(self, effect: Probe) -> None:
        self._spawn(self._probe(effect), f"probe {effect.model}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def adopt(self, config: ModelConfig, handle: UnitHandle, facts: EngineFacts) -> Instance:
        """Take over an engine that a former supervisor started."""
        instance = self.instance(config)
        instance.handle, instance.facts = handle, facts
        self._drivers.output.attach(handle)
        self._drivers.units.watch(handle, self._exited)
        return instance

    async def close(self) -> None:
        """Stop working on operations; the next supervisor adopts the engines as they are. Engines
        restored ahead serve no request and are ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ahead.close()
        await self._images.close()

    # ---- operations -----------------------------------------------------------------------------

    async def _operation(self, effect: RunPlan, former: asyncio.Task[None] | None) -> None:
        if former is not None and not former.done():
            await self._overtake(effect, former)
        instance = self.instance(effect.config)
        instance.config = effect.config
        instance.facts = replace(instance.facts, gpus=effect.gpus or instance.facts.gpus)
        instance.phases = []
        instance.image = None
        instance.died = asyncio.get_running_loop().create_future()
        cold = effect.plan.kind is PlanKind.START
        if cold:
            why = self._images.why_cold(effect.config)
            log.info("Starting %s cold (%s)", effect.model, why, extra={"model": effect.model})
        began = monotonic()
        ended = await self._ladder(effect, instance)
        if cold and ended.outcome is Outcome.UP:
            instance.facts = replace(instance.facts, cold_seconds=monotonic() - began)
        died, instance.died = instance.died, None
        instance.step = None
        parked = ended.outcome is Outcome.PARKED
        used = await host_bytes(self._drivers, instance) if parked else None
        self._post(
            OperationFinished(
                effect.model, effect.op, ended.outcome, ended.detail, ended.eviction, used
            )
        )
        if died.done() and instance.handle is not None and ended.outcome is not Outcome.DOWN:
            self._post(EngineExited(effect.model, died.result()))
        if ended.outcome is Outcome.DOWN:
            instance.handle = None

    async def _overtake(self, effect: RunPlan, former: asyncio.Task[None]) -> None:
        """The core gave the former operation up: cancel it, and wait a little for its end. A step
        that cannot even be cancelled is left behind; its engine is killed by this operation."""
        log.warning(
            "%s is given up before its end", former.get_name(), extra={"model": effect.model}
        )
        former.cancel()
        await asyncio.wait([former], timeout=GIVE_UP_SECS)

    async def _ladder(self, effect: RunPlan, instance: Instance) -> _Ended:
        """Run the plan; when it fails, the cheaper way to park where the engine is unharmed; then
        the fallback."""
        ordered = effect.plan.eviction
        try:
            effect, why = await self._prepare(effect, instance)
            await self._run_steps(effect.plan.steps, effect, instance)
            if effect.plan.success is Outcome.UP:
                await self._see_that_it_listens(instance)
                await self.steps.learn_awake(effect, instance)
                if instance.image is not None:
                    await self._images.served(instance.image)
            other = effect.plan.eviction if effect.plan.eviction != ordered else None
            return _Ended(effect.plan.success, why, other)
        except Exception as error:  # noqa: BLE001  # every failure takes the ladder
            failure = error
        detail = self._failed(effect, failure)
        if instance.image is not None and not _of_host(failure):
            # it was restored, and then did not answer as before
            await self._distrust(instance.image, detail)
        try:
            if (kept := without_image(effect, instance, failure)) is not None:
                await self._run_steps(kept.plan.steps, kept, instance)
                return _Ended(Outcome.PARKED, detail, kept.plan.eviction)
        except Exception as error:  # noqa: BLE001  # every failure takes the ladder
            detail = f"{detail}; then {self._failed(effect, error)}"
        try:
            await self._drop_ahead(effect.model)
            await self._run_steps(effect.plan.fallback, effect, instance)
        except Exception as error:  # every failure takes the ladder
            log.error(
                "cannot clean up %s: %s",
                effect.model,
                error,
                exc_info=not _expected(error),
                extra={"model": effect.model, "reason": str(error)},
            )
            return _Ended(Outcome.STUCK, f"{detail}; then {str(error) or type(error).__name__}")
        return _Ended(Outcome.DOWN, detail)

    async def _see_that_it_listens(self, instance: Instance) -> None:
        """Before a grant. Raises EngineUnhealthy when clients would reach another process."""
        address = instance.facts.address
        if address is not None:
            async with asyncio.timeout(PREPARE_SECS):
                await refuse_strangers(
                    self._drivers, instance.config.name, address, instance.handle
                )

    async def _prepare(self, effect: RunPlan, instance: Instance) -> tuple[RunPlan, str]:
        """Return the effect to run: with the shorter plan where an image is on disk already, with
        weights discarded where they do not fit into host memory, and why."""
        async with asyncio.timeout(PREPARE_SECS):
            if not effect.plan.restores:
                await self.ahead.dropped(effect.model)
            plan, why = await self._images.shorten(effect.plan, instance), ""
        if (look := self._drivers.available_memory) is not None:
            plan, why = fitting(plan, effect.config, instance.facts.identity, look())
        if why:
            log.warning("%s: %s", effect.model, why, extra={"model": effect.model})
        return replace(effect, plan=plan), why

    async def _drop_ahead(self, model: str) -> None:
        async with asyncio.timeout(PREPARE_SECS):
            await self.ahead.dropped(model)

    def _failed(self, effect: RunPlan, error: Exception) -> str:
        """Log why the plan failed; a fault of ours with its traceback."""
        detail = str(error) or type(error).__name__
        detail += behind_answer(self._drivers.output, effect.config, effect.plan.kind, error)
        if not isinstance(error, LlmuxError):
            detail = f"cannot {effect.plan.kind} model {effect.model!r}: {detail}"
        log.warning(
            "cannot %s %s: %s",
            effect.plan.kind,
            effect.model,
            detail,
            exc_info=None if _expected(error) else error,
            extra={"model": effect.model, "reason": detail},
        )
        return detail

    async def _run_steps(
        self, steps: tuple[Step, ...], effect: RunPlan, instance: Instance
    ) -> None:
        for step in steps:
            await self._step(step, effect, instance)

    async def _step(self, step: Step, effect: RunPlan, instance: Instance) -> None:
        if self.steps.is_void(step, instance):
            return
        began = monotonic()
        result = "ok"
        instance.report(step.kind)
        try:
            async with asyncio.timeout(step.deadline + BACKSTOP_SECS):
                await self._or_death(step, self.steps.run(step, effect, instance), instance)
        except TimeoutError:
            result = "timeout"
            message = f"not done after {step.deadline:g} s, outcome unknown"
            if not step.optional:
                raise DriverTimeout(step.kind, effect.model, message) from None
        except Exception as error:  # every failure takes the ladder
            result = "timeout" if isinstance(error, DriverTimeout) else "failed"
            if not step.optional:
                raise
            log.debug(
                "%s %s: %s",
                step.kind,
                effect.model,
                error,
                exc_info=not _expected(error),
                extra={"model": effect.model},
            )
        finally:
            seconds = monotonic() - began
            instance.phases.append((step.kind, seconds))
            self._on_phase(effect.model, step.kind, seconds, result)

    async def _or_death(
        self, step: Step, work: Coroutine[Any, Any, None], instance: Instance
    ) -> None:
        """Do the step; raise EngineUnhealthy as soon as the engine dies."""
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
            await self._images.distrust(image, reason)
        except Exception as error:  # every failure takes the ladder
            log.error(
                "cannot quarantine the image of %s: %s",
                image.model,
                error,
                exc_info=not _expected(error),
            )

    def _death(self, instance: Instance, died: asyncio.Future[str]) -> str:
        return f"it died: {with_cause(self._drivers.output, instance.config, died.result())}"

    def _exited(self, handle: UnitHandle, description: str) -> None:
        instance = self.instances.get(handle.model)
        if instance is None or instance.handle != handle:
            return
        if instance.died is None:
            text = with_cause(self._drivers.output, instance.config, description)
            self._post(EngineExited(handle.model, text))
        elif not instance.died.done():
            instance.died.set_result(description)

    # ---- probes ---------------------------------------------------------------------------------

    async def _probe(self, effect: Probe) -> None:
        instance = self.instance(effect.config)
        error: str | None = None
        try:
            address = instance.facts.address
            if address is None:
                raise EngineUnhealthy("reach", f'model "{effect.model}"', "it has no engine")
            watch = Watch(
                self._drivers,
                effect.model,
                address,
                instance.handle,
                stalled=effect.stalled,
                progress=instance.progress,
            )
            async with asyncio.timeout(effect.seconds + BACKSTOP_SECS):
                try:
                    await watch.run(effect.seconds)
                finally:
                    instance.progress = watch.progress
        except TimeoutError:
            error = f"no sign of life within {effect.seconds:g} s"
        except Exception as failure:  # whatever it is, there was no sign of life
            error = str(failure) or type(failure).__name__
            if not _expected(failure):
                log.exception("cannot probe %s", effect.model, extra={"model": effect.model})
        self._post(ProbeFinished(effect.model, effect.epoch, error, effect.stalled))

    def heard(self, model: str, line: str) -> None:
        """A line of an engine's output, or a progress bar on one that has no end yet."""
        if (instance := self.instances.get(model)) is not None:
            instance.heard(line)

    def notes(self, name: str) -> dict[str, Any]:
        """What a next supervisor needs to know of the instance."""
        instance = self.instances.get(name)
        return {} if instance is None else instance.notes()


def _of_host(error: Exception) -> bool:
    """Whether this host is at fault, as a GPU without room: the image is as good as it was."""
    return isinstance(error, CheckpointFailed) and error.blame is Blame.HOST


def _expected(error: Exception) -> bool:
    """Whether the error says what failed; of any other the traceback is needed."""
    return isinstance(error, (LlmuxError, OSError))
