"""The working copy of the state while events are applied: every change goes through a method here.

Never leaves ``reduce``; from outside the core stays a function of values. ``operations`` brings
models up and takes them down, ``schedule`` decides which; both change the state by these methods
only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llmux.config.schema import Config, Eviction, Weights
from llmux.core.demand.usage import UNUSED, Costs, Usage
from llmux.core.demand.workers import (
    NO_DEMAND,
    Worker,
    WorkerDemand,
    demand_by_model,
    demand_for,
)
from llmux.core.effects import (
    DropAhead,
    Effect,
    EndReading,
    OrderAnswered,
    Probe,
    ReadWeights,
    RunPlan,
    SendGrant,
    SendRefuse,
    Verdict,
)
from llmux.core.plans import PROBE_SECS, Plan
from llmux.core.policies.base import Policy
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Phase,
    Reservation,
    State,
    Stopped,
    oldest_of,
)
from llmux.core.states import MOVING, TRANSITIONS, ModelState
from llmux.errors import InvariantError, Reason

# An operation ends by the deadlines of its steps. This much later it is taken to hang: time for
# what its plan does not list (an engine restored ahead ends, an image is looked for).
OVERDUE_SECS = 240.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a want ended without the model serving."""

    reason: Reason
    message: str


class Transaction:
    """Owns the models, wants, reservations, workers and effects of one reduction.

    The mappings are for reading. ``move`` is the only way to another state of a known model,
    ``add`` the only way in, ``forget`` the only way out; a want is made by ``want`` and ended by
    ``unwant``, a reservation is made by ``reserve`` and ended by ``forget_reservation``.
    """

    def __init__(self, state: State, now: float) -> None:
        self.base = state
        self.now = now
        self.waiters = state.waiters
        self.configure(state.config)
        self._models = dict(state.models)
        self._by_phase: dict[type[Phase], list[tuple[int, str]]] | None = None
        self._workers = dict(state.workers)
        self._demands = dict(state.demands)
        self._wants = dict(state.wants)
        self._reservations = dict(state.reservations)
        self._costs = Costs(state.costs)
        self.models: Mapping[str, ModelRecord] = self._models
        self.workers: Mapping[str, Worker] = self._workers
        self.wants: Mapping[str, float] = self._wants
        self.reservations: Mapping[str, Reservation] = self._reservations
        self._usage = dict(state.usage)
        self.usage: Mapping[str, Usage] = self._usage
        self.manual = state.manual
        self.pinned = state.pinned
        self._pins = dict(state.pins)
        self.memory_short = state.memory_short
        self._next_op = state.next_op
        self._next_epoch = state.next_epoch
        self._wakeup: float | None = None
        self._effects: list[Effect] = []
        self._refusals: dict[str, Refusal] = {}
        self._loads: list[tuple[int, str]] = []

    def configure(self, config: Config) -> None:
        if config is not self.base.config:
            self.waiters = {}
        self.config = config
        self.policy: Policy = self.base.policy_of(config.policy)

    def finish(self) -> tuple[State, tuple[Effect, ...]]:
        for order, name in self._loads:
            self._answer_load(order, name)
        state = replace(
            self.base,
            config=self.config,
            models=MappingProxyType(self._models),
            workers=MappingProxyType(self._workers),
            demands=MappingProxyType(self._demands),
            waiters=self.waiters,
            wants=MappingProxyType(self._wants),
            reservations=MappingProxyType(self._reservations),
            costs=MappingProxyType(self._costs.known),
            usage=MappingProxyType(self._usage),
            manual=self.manual,
            pinned=self.pinned,
            pins=MappingProxyType(self._pins),
            memory_short=self.memory_short,
            next_op=self._next_op,
            next_epoch=self._next_epoch,
            wakeup=self._wakeup,
            generation=self.base.generation + 1,
        )
        return state, tuple(self._effects)

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def wake_at(self, when: float) -> None:
        """Ask for a Tick no later than ``when``."""
        if self._wakeup is None or when < self._wakeup:
            self._wakeup = when

    # ---- models -------------------------------------------------------------------------------

    def at(self, *phases: type[Phase]) -> list[tuple[str, ModelRecord]]:
        """The models that are in these phases now, in the order of all models. Of hundreds most
        are in one phase, and most questions are about the others."""
        if self._by_phase is None:
            self._by_phase = {}
            for place, (name, record) in enumerate(self._models.items()):
                self._by_phase.setdefault(type(record.phase), []).append((place, name))
        found = [name for phase in phases for name in self._by_phase.get(phase, ())]
        if len(phases) > 1:
            found.sort()
        return [(name, self._models[name]) for _, name in found]

    def add(self, record: ModelRecord) -> None:
        """A model that was not known: configured now, or found running."""
        self._models[record.config.name] = record
        self._by_phase = None

    def put(self, record: ModelRecord) -> None:
        """Change facts of a model; its state stays."""
        name = record.config.name
        if record.phase.state is not self._models[name].phase.state:
            raise InvariantError(f"internal error: {name} changes its state without a move")
        self._models[name] = record

    def move(self, name: str, phase: Phase) -> None:
        """Change the state of a model. An illegal transition is a bug."""
        old = self._models[name].phase
        if phase.state is not old.state and phase.state not in TRANSITIONS[old.state]:
            raise InvariantError(f"internal error: {name} cannot go {old.state} → {phase.state}")
        self.found(name, phase)

    def found(self, name: str, phase: Phase) -> None:
        """Adoption: the state that a model is observed in, whatever the transitions say."""
        self._models[name] = replace(self._models[name], phase=phase)
        self._by_phase = None

    def forget(self, name: str) -> None:
        """Remove a model that is no longer configured; ``can_forget`` must hold."""
        self.forget_reservation(name)
        self.unwant(name, Reason.UNKNOWN_MODEL, f'the model "{name}" was removed')
        self._usage.pop(name, None)
        self._pins.pop(name, None)
        del self._models[name]
        self._by_phase = None

    def can_forget(self, name: str) -> bool:
        phase = self.models[name].phase
        return isinstance(phase, Stopped) or (isinstance(phase, Failed) and not phase.held)

    def way_back(self, name: str) -> Eviction | None:
        """How the model is parked, in memory or on disk; None = only a cold start is left."""
        record = self.models[name]
        return record.phase.eviction if isinstance(record.phase, Parked) else record.image

    def operation(self) -> int:
        op = self._next_op
        self._next_op += 1
        return op

    def epoch(self) -> str:
        epoch = f"{self.base.epoch_prefix}.{self._next_epoch}"
        self._next_epoch += 1
        return epoch

    def run(self, name: str, op: int, plan: Plan) -> None:
        record = replace(self.models[name], overdue_at=self.now + plan.deadline + OVERDUE_SECS)
        self.put(record)
        self.wake_at(record.overdue_at)
        self.emit(RunPlan(name, op, plan, record.engine, record.gpus))

    def suspect(self, name: str, *, stalled: bool = False) -> None:
        """Look for signs of life of the engine, unless that is under way. ``stalled``: for the
        second half of the stall timeout, so that one that hangs is replaced within it."""
        record = self.models[name]
        if record.probing or record.epoch is None:
            return
        self.put(replace(record, probing=True, probed_at=self.now))
        limit = record.config.stall_timeout_secs
        seconds = limit / 2 if stalled else min(PROBE_SECS, limit or PROBE_SECS)
        self.emit(Probe(name, record.epoch, record.engine, seconds, stalled))

    def learn_cost(self, name: str, operation: str, seconds: float) -> None:
        self._costs.learn(name, operation, seconds)
        self.waiters = {}  # what is not known of others is taken from this

    def cost(self, name: str, operation: str) -> float:
        return self._costs.of(name, operation)

    # ---- pins ---------------------------------------------------------------------------------

    def pin(self, name: str, until: float | None) -> None:
        if until is None:
            self._pins.pop(name, None)
        elif name in self._models:
            self._pins[name] = until

    def is_kept(self, name: str) -> bool:
        """Makes no room for others. Asks for a Tick at a pin's end; a pin that ended is dropped."""
        until = self._pins.get(name)
        if until is not None and until <= self.now:
            del self._pins[name]
        elif until is not None:
            if until < math.inf:
                self.wake_at(until)
            return True
        return name == self.pinned or self.models[name].config.never_evict

    # ---- wants and reservations ---------------------------------------------------------------

    def want(self, name: str) -> None:
        """An operator wants the model resident."""
        self._wants[name] = self.now

    def unwant(self, name: str, reason: Reason, message: str) -> None:
        """The operator's want ends unfulfilled; ``message`` answers an order made just now."""
        self._wants.pop(name, None)
        self._refusals[name] = Refusal(reason, message)

    def fulfil(self, name: str) -> Reservation | None:
        """The model serves: its want and its reservation end. Returns the reservation."""
        self._wants.pop(name, None)
        return self._end_reservation(name)

    def reserve(self, name: str, reservation: Reservation) -> None:
        """Make or replace the model's place in the queue for room."""
        self._reservations[name] = reservation

    def read_weights(self, name: str, gpus: tuple[int, ...]) -> None:
        """Order them into the page cache, once, where the way back loads them."""
        way_back = self.way_back(name)
        loads = way_back is None or way_back.weights is Weights.DISCARD
        if loads and not self.reservations[name].loading:
            self.reserve(name, replace(self.reservations[name], loading=True))
            self.emit(ReadWeights(name, self.models[name].engine, gpus))

    def drop_ahead(self, name: str) -> None:
        """Give up what was restored ahead of the model's wake, if anything was."""
        reservation = self.reservations.get(name)
        if reservation is not None and reservation.ahead:
            self.reserve(name, replace(reservation, ahead=False))
            self.emit(DropAhead(name))

    def forget_reservation(self, name: str) -> None:
        self.drop_ahead(name)
        self._end_reservation(name)

    def _end_reservation(self, name: str) -> Reservation | None:
        reservation = self._reservations.pop(name, None)
        if reservation is not None and reservation.loading:
            self.emit(EndReading(name))
        return reservation

    # ---- orders -------------------------------------------------------------------------------

    def answer(
        self, order: int | None, verdict: Verdict, message: str = "", reason: Reason | None = None
    ) -> None:
        if order is not None:
            self.emit(OrderAnswered(order, verdict, reason, message))

    def answer_load_when_decided(self, order: int | None, name: str) -> None:
        """The answer to a load depends on what the scheduler makes of it."""
        if order is not None:
            self._loads.append((order, name))

    def _answer_load(self, order: int, name: str) -> None:
        record = self.models.get(name)
        coming = record is not None and record.state in MOVING | {ModelState.SERVING}
        if name in self.wants or coming:
            self.answer(order, Verdict.ACCEPTED)
        else:
            refusal = self._refusals[name]
            self.answer(order, Verdict.REFUSED, refusal.message, refusal.reason)

    # ---- workers and demand -------------------------------------------------------------------

    @property
    def demands(self) -> Mapping[str, WorkerDemand]:
        return self._demands

    def demand(self, name: str) -> WorkerDemand:
        """The demand of all workers together."""
        return self._demands.get(name, NO_DEMAND)

    def oldest_since(self, name: str) -> float | None:
        """When the oldest waiter for the model (operators included) began to wait."""
        return oldest_of(self.demand(name), self.wants.get(name))

    def set_worker(self, worker_name: str, worker: Worker) -> None:
        self._workers[worker_name] = worker
        self._demands = demand_by_model(self._workers)

    def remove_worker(self, worker_name: str) -> None:
        worker = self._workers.pop(worker_name, None)
        self._demands = demand_by_model(self._workers)
        for name, demand in worker.demands.items() if worker is not None else ():
            self._use(name, demand, NO_DEMAND)

    def _use(self, name: str, before: WorkerDemand, after: WorkerDemand) -> None:
        """Learn from a change of one worker's demand."""
        if name not in self._models:
            return
        usage = self._usage.get(name, UNUSED)
        completed = max(0, after.completed - before.completed)
        more = after.waiting + after.in_flight - before.waiting - before.in_flight
        self._usage[name] = usage.after(
            self.now,
            arrived=max(0, more + completed),
            completed=completed,
            in_flight=max(0, usage.in_flight + after.in_flight - before.in_flight),
            places=self.config.gateway.max_in_flight,
        )

    def set_demand(self, worker_name: str, name: str, demand: WorkerDemand) -> None:
        worker = self.workers[worker_name]
        self._use(name, worker.demands.get(name, NO_DEMAND), demand)
        demands = MappingProxyType({**worker.demands, name: demand})
        self._workers[worker_name] = replace(worker, demands=demands)
        self._demands[name] = demand_for(name, self._workers.values())

    def hold(self, worker_name: str, name: str, epoch: str | None) -> None:
        """Note that the worker holds ``epoch`` of the model; None: no epoch any more."""
        worker = self.workers[worker_name]
        holds = dict(worker.holds)
        if epoch is None:
            holds.pop(name, None)
        else:
            holds[name] = epoch
        self._workers[worker_name] = replace(worker, holds=MappingProxyType(holds))

    def release_holds(self, name: str) -> None:
        for worker_name, worker in list(self.workers.items()):
            if name in worker.holds:
                self.hold(worker_name, name, None)

    def grant(self, name: str, epoch: str) -> None:
        for worker_name in list(self.workers):
            self.grant_to(worker_name, name, epoch)

    def grant_to(self, worker_name: str, name: str, epoch: str) -> None:
        self.hold(worker_name, name, epoch)
        self.emit(SendGrant(worker_name, name, epoch))

    def refuse(
        self, name: str, reason: Reason, message: str, retry_after: float | None = None
    ) -> None:
        """Refuse every request that waits for the model, once."""
        for worker_name, worker in list(self.workers.items()):
            demand = worker.demands.get(name, NO_DEMAND)
            if demand.waiting:
                self.emit(SendRefuse(worker_name, name, reason.value, message, retry_after))
                self.set_demand(worker_name, name, replace(demand, waiting=0, oldest_since=None))
