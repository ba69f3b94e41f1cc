"""A supervisor on the in-memory twins, with nothing of it replaced but the drivers."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from types import MappingProxyType
from typing import Any

from llmux.config.schema import (
    Config,
    Eviction,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.core.effects import RunPlan
from llmux.core.events import DemandChanged, Event, OperationFinished, WorkerDrained, WorkerJoined
from llmux.core.plans import Plan
from llmux.core.records import State
from llmux.core.states import MOVING
from llmux.image_ports import Interrupted
from llmux.protocol import Grant, Message, ProgressCallback, Refuse, Revoke
from llmux.runtime.control.orders import ignore_progress
from llmux.runtime.control.validation import Validation
from llmux.runtime.control.verbs import Verbs
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.host import Drivers, Places
from llmux.runtime.loop import Loop
from llmux.runtime.reconcile import adopt_engines, first_state
from tests.twins.disk import MemoryCheckpointer, MemoryStore
from tests.twins.engine import MemoryEngine
from tests.twins.gpu import MemoryCuda, MemoryGpu
from tests.twins.units import MemoryFreezer, MemoryOutput, MemoryUnits
from tests.twins.world import World

SECONDS = 20.0  # nothing on the twins takes time; a busy machine does

# every switch as soon as it is wanted: what is tested here is how, not when
AT_ONCE: dict[str, Any] = {"policy_type": PolicyType.FIFO, "min_active_secs": 0.0}

STOP = Eviction(Weights.RETAIN, Process.STOP)
OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
DISCARD = Eviction(Weights.DISCARD, Process.KEEP_RUNNING)
OFFLOAD_FREEZE = Eviction(Weights.OFFLOAD, Process.FREEZE)


def model(name: str, **settings: Any) -> ModelConfig:
    return ModelConfig(name, f"models/{name}", **({"eviction": OFFLOAD} | settings))


def config_of(*models: ModelConfig, **policy: Any) -> Config:
    settings = PolicyConfig(**(AT_ONCE | policy))
    return Config(models=MappingProxyType({m.name: m for m in models}), policy=settings)


def _files(world: World, name: str) -> dict[str, str]:
    size = world.sizes.get(name)
    return {} if size is None else {"file.model.safetensors": f"{size.weights} bytes, 1"}


def drivers_on(world: World, runtime: str) -> Drivers:
    return Drivers(
        units=MemoryUnits(world),
        freezer=MemoryFreezer(world),
        engine=MemoryEngine(world),
        output=MemoryOutput(world),
        gpu=MemoryGpu(world),
        places=Places(runtime, environment={"PATH": "/usr/bin"}),
        identity=lambda config, spec: {"model": config.model_path, **_files(world, config.name)},
        portable_identity=lambda config, spec, salt: {"model": config.model_path, "salt": salt},
        checkpointer=MemoryCheckpointer(world),
        cuda=MemoryCuda(world),
        available_memory=lambda: world.memory_bytes,
    )


# ---- time ---------------------------------------------------------------------------------------


class _Jump(selectors.DefaultSelector):
    """Where nothing else can happen, the next timer's time has come."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self.threads = 0  # at work; they take real time

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(None if self.threads and timeout != 0 else 0)
        if not found and timeout is not None and timeout > 0:
            self.passed += timeout
        return found if found or timeout is not None else super().select(None)


class VirtualTime(asyncio.SelectorEventLoop):
    """asyncio's deadlines pass at once when there is nothing left to do before them."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return super().time() + self._jump.passed

    def run_in_executor(  # type: ignore[override]  # its own are generic
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self._jump.threads += 1

        def done(_: object) -> None:
            self._jump.threads -= 1

        future.add_done_callback(done)
        return future


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualTime) as runner:
            runner.run(test(*args, **kwargs))

    return run


# ---- the executor alone -------------------------------------------------------------------------


class Shop:
    """An executor and whatever it posts."""

    def __init__(self, world: World, runtime: str, **drivers: Any) -> None:
        """``drivers`` replace the twins of these names."""
        self.world = world
        self.posted: asyncio.Queue[Event] = asyncio.Queue()
        self.phases: list[tuple[str, str]] = []
        self.quarantined: list[str] = []
        chosen = self.drivers = replace(drivers_on(world, runtime), **drivers)
        self.executor = Executor(
            chosen,
            ImageLifecycle(chosen, self.posted.put_nowait, self.quarantined.append),
            self.posted.put_nowait,
            lambda _model, kind, _secs, result: self.phases.append((str(kind), result)),
        )
        self._op = 0

    def begin(self, config: ModelConfig, plan: Plan) -> int:
        self._op += 1
        self.phases.clear()
        self.executor.run(RunPlan(config.name, self._op, plan, config, (0,)))
        return self._op

    async def ended(self) -> OperationFinished:
        while not isinstance(event := await self.posted.get(), OperationFinished):
            pass
        assert event.op == self._op
        return event

    async def run(self, config: ModelConfig, plan: Plan) -> OperationFinished:
        self.begin(config, plan)
        return await self.ended()


# ---- the whole supervisor -----------------------------------------------------------------------


def at_rest(state: State) -> bool:
    return (
        not any(record.state in MOVING for record in state.models.values())
        and not state.wants
        and not any(state.waiting(name) for name in state.models)
    )


@dataclass
class Life:
    """One life of a supervisor: reconcile, then the loop. ``drop`` ends it as a crash does."""

    loop: Loop
    executor: Executor
    images: ImageLifecycle
    drivers: Drivers
    sent: list[tuple[str, Message]] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)  # models, as told to metrics
    running: asyncio.Task[None] | None = None

    async def until(self, predicate: Callable[[State], bool]) -> State:
        return await self.loop.wait_for(predicate, SECONDS)

    async def until_state(self, name: str, *states: str) -> None:
        await self.until(lambda state: state.models[name].state.value in states)

    async def settled(self) -> None:
        """Everything that was posted so far has been handled and what it began has ended."""
        await self.until(lambda state: not self.loop.pending and at_rest(state))

    def state_of(self, name: str) -> str:
        return self.loop.state.models[name].state.value

    def demand(self, name: str, waiting: int = 0, in_flight: int = 0) -> None:
        since = monotonic() if waiting else None
        self.loop.post(DemandChanged("w", name, waiting, since, in_flight, 0))

    def said(self, kind: type[Message]) -> list[Message]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    async def drop(self) -> None:
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.executor.close()

    def verbs(self) -> Verbs:
        async def reload() -> None: ...

        return Verbs(self.loop, self.executor, self.images, self.drivers, reload)

    def validation(self, name: str, report: ProgressCallback = ignore_progress) -> Validation:
        return Validation(self.loop, self.executor, self.drivers, name, report)


async def begin_life(
    config: Config,
    world: World,
    runtime: str,
    store: MemoryStore,
    holds: Mapping[str, str] | None = None,
    interrupted: Sequence[Interrupted] = (),
) -> Life:
    """As the composition root does; one worker, "w", whose requests are over as soon as they are
    let in and which answers every revoke with drained."""
    drivers = drivers_on(world, runtime)
    assert isinstance(drivers.checkpointer, MemoryCheckpointer)
    drivers.checkpointer.interrupted = list(interrupted)
    life: Life

    def send(worker: str, message: Message) -> None:
        life.sent.append((worker, message))
        match message:
            case Revoke():
                life.loop.post(WorkerDrained(worker, message.model, message.epoch))
            case Grant() | Refuse():
                life.demand(message.model)  # none waits any more; what was let in is over

    state = await first_state(config, drivers)
    images: ImageLifecycle
    quarantined: list[str] = []

    def executor(post: Callable[[Event], None]) -> Executor:
        nonlocal images
        images = ImageLifecycle(drivers, post, quarantined.append)
        return Executor(drivers, images, post, lambda *_: None)

    loop = Loop(state, executor=executor, store=store, send=send)
    life = Life(loop, loop.executor, images, drivers, quarantined=quarantined)
    adopted, effects = await adopt_engines(state, loop.executor, images, drivers, store.load())
    loop.enter(adopted, effects)
    life.running = asyncio.create_task(loop.run())
    loop.post(WorkerJoined("w", dict(holds or {})))
    return life
