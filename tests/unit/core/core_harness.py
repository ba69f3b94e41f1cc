"""A core to ask: state, time, and what the last event made it do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from llmux.config.schema import (
    Config,
    Eviction,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.core.effects import Effect, RunPlan, SendGrant, SendRefuse
from llmux.core.events import (
    DemandChanged,
    Event,
    GpuReleased,
    OperationFinished,
    Tick,
    WorkerDrained,
    WorkerJoined,
)
from llmux.core.plans import Outcome
from llmux.core.records import ModelRecord, State
from llmux.core.reducer import initial, reduce
from llmux.core.states import ModelState

E = TypeVar("E")

# every switch as soon as it is wanted: what is tested here is how, not when
AT_ONCE: dict[str, Any] = {"policy_type": PolicyType.FIFO, "min_active_secs": 0.0}

STOP = Eviction(Weights.RETAIN, Process.STOP)
OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
DISCARD = Eviction(Weights.DISCARD, Process.KEEP_RUNNING)
FREEZE = Eviction(Weights.RETAIN, Process.FREEZE)
CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
WORKER = "w"


def model(name: str, **settings: Any) -> ModelConfig:
    return ModelConfig(name, f"models/{name}", **({"eviction": OFFLOAD} | settings))


def config_of(*models: ModelConfig, **policy: Any) -> Config:
    settings = PolicyConfig(**(AT_ONCE | policy))
    return Config(models=MappingProxyType({m.name: m for m in models}), policy=settings)


class Core:
    """One worker, "w", has joined. ``effects`` are those of the last event."""

    def __init__(self, *models: ModelConfig, gpu_count: int = 1, **policy: Any) -> None:
        self.now = 100.0
        self.effects: tuple[Effect, ...] = ()
        self.running: dict[str, RunPlan] = {}
        self.state: State = initial(
            config_of(*models, **policy), gpu_count=gpu_count, epoch_prefix="t"
        )
        self.happen(WorkerJoined(WORKER, {}))

    def happen(self, event: Event) -> tuple[Effect, ...]:
        self.state, self.effects = reduce(self.state, event, self.now)
        self.running |= {plan.model: plan for plan in self.done(RunPlan)}
        return self.effects

    def done(self, kind: type[E]) -> list[E]:
        """The last event's effects of one kind."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    # ---- what the world does --------------------------------------------------------------------

    def demand(
        self,
        name: str,
        waiting: int = 0,
        in_flight: int = 0,
        *,
        progress: int = 0,
        age: float = 0,
        repeated: int = 0,
        completed: int = 0,
    ) -> None:
        oldest = self.now - age if waiting else None
        self.happen(
            DemandChanged(
                WORKER, name, waiting, oldest, in_flight, progress, completed, repeated=repeated
            )
        )

    def drained(self, name: str) -> None:
        """The worker's last request on the model's epoch has ended."""
        epoch = self.record(name).epoch
        assert epoch is not None
        self.demand(name)
        self.happen(WorkerDrained(WORKER, name, epoch))

    def finish(self, name: str, outcome: Outcome | None = None, detail: str = "") -> None:
        """The model's operation ends, as planned when no outcome is given."""
        effect = self.running.pop(name)
        ended = effect.plan.success if outcome is None else outcome
        self.happen(OperationFinished(name, effect.op, ended, detail))

    def release(self, name: str) -> None:
        """The GPU memory of a model that is being parked is gone; its image is being written."""
        self.happen(GpuReleased(name, self.running[name].op))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.happen(Tick())

    # ---- short ways -----------------------------------------------------------------------------

    def serve(self, name: str) -> None:
        """Bring the model up, with one request that then ends; room must be there."""
        self.demand(name, waiting=1)
        self.finish(name)
        self.demand(name)
        assert self.at(name) is ModelState.SERVING

    def park(self, name: str) -> None:
        """From draining to rest."""
        self.drained(name)
        self.finish(name)

    def put(self, name: str, **facts: Any) -> None:
        """From now on the model's record has these facts, however they came about."""
        models = {**self.state.models, name: replace(self.record(name), **facts)}
        self.state = replace(self.state, models=models)

    # ---- what can be seen -----------------------------------------------------------------------

    def record(self, name: str) -> ModelRecord:
        return self.state.models[name]

    def at(self, name: str) -> ModelState:
        return self.record(name).state

    def states(self) -> Mapping[str, str]:
        return {name: record.state.value for name, record in self.state.models.items()}

    def granted(self) -> list[str]:
        return [grant.model for grant in self.done(SendGrant)]

    def refused(self) -> list[tuple[str, str]]:
        """(model, reason)"""
        return [(refusal.model, refusal.reason) for refusal in self.done(SendRefuse)]

    def plans(self) -> list[str]:
        """ "start alpha", … of the last event."""
        return [f"{effect.plan.kind} {effect.model}" for effect in self.done(RunPlan)]
