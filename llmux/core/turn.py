"""One turn of the reducer: a working copy of the state, and the effects collected so far.

Never leaves ``reduce``; from outside the core stays a function of values.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llmux.config.schema import Config, Eviction, Process
from llmux.core.effects import (
    DropAhead,
    Effect,
    Probe,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
    SwitchFinished,
)
from llmux.core.plans import Plan, park_plan, start_plan, stop_plan, wake_plan
from llmux.core.policy import Policy, policy_for
from llmux.core.records import (
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
    share_now,
)
from llmux.core.states import TRANSITIONS, ModelState
from llmux.errors import InvariantError, Reason

CUT_GRACE_SECS = 5.0  # a worker that does not answer a cut has no say any more
COST_WEIGHT = 0.3  # of the newest sample
UNKNOWN_COST_SECS = 10.0  # before the first switch to a model
HEALTHY_SECS = 60.0  # an engine that served so long was not failing to start


class Turn:
    """A mutable working copy of ``State`` for the length of one event."""

    def __init__(self, state: State, now: float) -> None:
        self.base = state
        self.now = now
        self.config = state.config
        self.policy = self.policy_of(state.config)
        self.models = dict(state.models)
        self.workers = dict(state.workers)
        self.wants = dict(state.wants)
        self.reservations = dict(state.reservations)
        self.costs = dict(state.costs)
        self.manual = state.manual
        self.pinned = state.pinned
        self.next_op = state.next_op
        self.next_epoch = state.next_epoch
        self.wakeup: float | None = None
        self.effects: list[Effect] = []

    @staticmethod
    def policy_of(config: Config) -> Policy:
        return policy_for(config.policy)

    # ---- the working copy ---------------------------------------------------------------------

    def finish(self) -> tuple[State, tuple[Effect, ...]]:
        state = replace(
            self.base,
            config=self.config,
            models=MappingProxyType(self.models),
            workers=MappingProxyType(self.workers),
            wants=MappingProxyType(self.wants),
            reservations=MappingProxyType(self.reservations),
            costs=MappingProxyType(self.costs),
            manual=self.manual,
            pinned=self.pinned,
            next_op=self.next_op,
            next_epoch=self.next_epoch,
            wakeup=self.wakeup,
            generation=self.base.generation + 1,
        )
        return state, tuple(self.effects)

    def view(self) -> State:
        """The working copy as a State, for its read-only questions."""
        return replace(
            self.base,
            models=self.models,
            workers=self.workers,
            wants=self.wants,
            reservations=self.reservations,
        )

    def wake_at(self, when: float) -> None:
        """Ask for a Tick no later than ``when``."""
        if self.wakeup is None or when < self.wakeup:
            self.wakeup = when

    def update(self, name: str, **changes: Any) -> ModelRecord:
        record = replace(self.models[name], **changes)
        self.models[name] = record
        return record

    def move(self, name: str, phase: Phase) -> None:
        """The only place where a model changes its state; an illegal step is a bug of ours."""
        old = self.models[name].phase
        if phase.state is not old.state and phase.state not in TRANSITIONS[old.state]:
            raise InvariantError(f"internal error: {name} cannot go {old.state} → {phase.state}")
        self.update(name, phase=phase)

    def operation(self) -> int:
        op = self.next_op
        self.next_op += 1
        return op

    def epoch(self) -> str:
        epoch = f"{self.base.epoch_prefix}.{self.next_epoch}"
        self.next_epoch += 1
        return epoch

    def run(self, name: str, op: int, plan: Plan) -> None:
        record = self.models[name]
        self.effects.append(RunPlan(name, op, plan, record.config, record.gpus))

    # ---- bringing up --------------------------------------------------------------------------

    def start(self, name: str, *, reason: str = "") -> None:
        """Cold start. The room is there."""
        op = self.operation()
        record = self.models[name]
        self.drop_ahead(name)
        self.move(name, Starting(op, self.now, reason))
        if (reservation := self.reservations.get(name)) is not None:
            room = self.now if reservation.room_at is None else reservation.room_at
            self.reservations[name] = replace(reservation, room_at=room, cold=True)
        self.run(name, op, start_plan(record.config, self.config.startup_timeout(record.config)))

    def way_back(self, name: str) -> Eviction | None:
        """How the model is parked, on disk at least; None = only a cold start is left."""
        record = self.models[name]
        return record.phase.eviction if isinstance(record.phase, Parked) else record.image

    def wake(self, name: str, eviction: Eviction) -> None:
        """The way back from how it was parked. The room is there."""
        op = self.operation()
        if eviction.process is not Process.CHECKPOINT:
            self.drop_ahead(name)
        self.move(name, Waking(op, self.now, eviction))
        if (reservation := self.reservations.get(name)) is not None:
            # what was restored ahead is the wake's now
            self.reservations[name] = replace(reservation, room_at=self.now, ahead=False)
        self.run(name, op, wake_plan(self.models[name].config, eviction))

    def serve(self, name: str) -> None:
        """Up and verified: everyone who waits is let in on a new epoch."""
        epoch = self.epoch()
        self.move(name, Serving(epoch, self.now))
        self.update(name, probing=False, progress_at=self.now, last_active=self.now)
        self.grant(name, epoch)
        self.wants.pop(name, None)
        reservation = self.reservations.pop(name, None)
        if reservation is not None:
            room = self.now if reservation.room_at is None else reservation.room_at
            drained = room if reservation.drained_at is None else reservation.drained_at
            self.learn_cost(name, self.now - drained)
            self.effects.append(
                SwitchFinished(
                    name,
                    reservation.victims,
                    reservation.cold,
                    reservation.decided_at,
                    drained,
                    room,
                    self.now,
                )
            )
        if (wanted := self.models[name].park_request) is not None:
            self.update(name, park_request=None)
            self.drain(name, wanted, None)

    def learn_cost(self, name: str, seconds: float) -> None:
        """A moving average: what a switch to the model costs is parking and waking, not waiting for
        somebody's stream to end."""
        known = self.costs.get(name)
        self.costs[name] = seconds if known is None else known + COST_WEIGHT * (seconds - known)

    def grant(self, name: str, epoch: str) -> None:
        for worker in self.workers:
            self.grant_to(worker, name, epoch)

    def grant_to(self, worker: str, name: str, epoch: str) -> None:
        self.hold(worker, name, epoch)
        self.effects.append(SendGrant(worker, name, epoch))

    # ---- ahead of a wake ------------------------------------------------------------------------

    def drop_ahead(self, name: str) -> None:
        """The model will not be woken from what was restored ahead, if anything was."""
        reservation = self.reservations.get(name)
        if reservation is not None and reservation.ahead:
            self.reservations[name] = replace(reservation, ahead=False)
            self.effects.append(DropAhead(name))

    def forget_reservation(self, name: str) -> None:
        self.drop_ahead(name)
        self.reservations.pop(name, None)

    # ---- taking down --------------------------------------------------------------------------

    def drain(self, name: str, eviction: Eviction, wanted_by: str | None) -> None:
        """Nothing new is let in; what runs may finish until the deadline."""
        record = self.models[name]
        serving = record.phase
        assert isinstance(serving, Serving)
        policy = self.config.policy
        patience = policy.drain_timeout_secs if policy.drain_before_switch else 0.0
        self.move(
            name,
            Draining(
                serving.epoch, serving.since, self.now, self.now + patience, eviction, wanted_by
            ),
        )
        for worker in self.holders(name, serving.epoch):
            self.effects.append(SendRevoke(worker, name, serving.epoch))

    def undrain(self, name: str) -> None:
        """Nobody wants the room any more: serve on, on a new epoch."""
        draining = self.models[name].phase
        assert isinstance(draining, Draining)
        epoch = self.epoch()
        self.move(name, Serving(epoch, draining.serving_since))
        self.grant(name, epoch)

    def advance_drain(self, name: str) -> None:
        """Park when the last request is gone, cut when the deadline has passed."""
        record = self.models[name]
        draining = record.phase
        assert isinstance(draining, Draining)
        holders = self.busy(name, draining.epoch)
        if holders and draining.cut_at is None and self.now >= draining.deadline:
            for worker in holders:
                self.effects.append(SendCut(worker, name, draining.epoch))
            draining = replace(draining, cut_at=self.now)
            self.update(name, phase=draining)
        if holders and draining.cut_at is not None and self.now >= draining.cut_at + CUT_GRACE_SECS:
            self.release_holds(name)  # it has no say any more
            holders = []
        if holders:
            cut_at = draining.cut_at
            self.wake_at(draining.deadline if cut_at is None else cut_at + CUT_GRACE_SECS)
            return
        op = self.operation()
        self.move(name, Parking(op, self.now, draining.eviction, draining.wanted_by))
        wanting = draining.wanted_by
        if wanting is not None and (reservation := self.reservations.get(wanting)) is not None:
            self.reservations[wanting] = replace(reservation, drained_at=self.now)
        self.run(name, op, park_plan(record.config, draining.eviction))

    def stop(self, name: str, reason: str, *, grace: bool, crashed: bool = False) -> None:
        op = self.operation()
        self.drop_ahead(name)
        share = share_now(self.models[name])
        self.move(name, Stopping(op, self.now, reason, share, crashed))
        self.run(name, op, stop_plan(self.models[name].config, grace=grace))

    def crash(self, name: str, reason: str) -> None:
        """The serving engine died or hangs: give its requests back, clean its unit up."""
        record = self.models[name]
        phase = record.phase
        assert isinstance(phase, (Serving, Draining))
        for worker in self.holders(name, phase.epoch):
            self.effects.append(SendRevoke(worker, name, phase.epoch, dead=True))
        self.release_holds(name)
        since = phase.since if isinstance(phase, Serving) else phase.serving_since
        failures = 1 if self.now - since >= HEALTHY_SECS else record.failures + 1
        self.update(name, failures=failures, probing=False)
        self.stop(name, reason, grace=False, crashed=True)

    def fail(self, name: str, message: str, *, held: bool = False) -> None:
        """Not again before a growing while; those who wait are told now."""
        failures = max(1, self.models[name].failures)
        self.update(name, failures=failures, park_request=None)
        policy = self.config.policy
        delay = min(policy.backoff_secs * 2 ** min(failures - 1, 20), policy.backoff_max_secs)
        self.move(name, Failed(self.now, self.now + delay, message, held))
        self.wants.pop(name, None)
        self.forget_reservation(name)
        self.refuse(name, Reason.START_FAILED, message, delay)

    # ---- workers ------------------------------------------------------------------------------

    def holders(self, name: str, epoch: str) -> list[str]:
        return [w for w, worker in self.workers.items() if worker.holds.get(name) == epoch]

    def busy(self, name: str, epoch: str) -> list[str]:
        """Workers that may still have requests on the engine: those that hold the epoch, and
        those with requests in flight from an earlier one."""
        return [
            worker_name
            for worker_name, worker in self.workers.items()
            if worker.holds.get(name) == epoch
            or ((demand := worker.demands.get(name)) is not None and demand.in_flight)
        ]

    def hold(self, worker: str, name: str, epoch: str | None) -> None:
        holds = dict(self.workers[worker].holds)
        if epoch is None:
            holds.pop(name, None)
        else:
            holds[name] = epoch
        self.workers[worker] = replace(self.workers[worker], holds=MappingProxyType(holds))

    def release_holds(self, name: str) -> None:
        for worker in self.workers:
            self.hold(worker, name, None)

    def refuse(
        self, name: str, reason: Reason, message: str, retry_after: float | None = None
    ) -> None:
        """Answer everyone who waits for the model, once."""
        for worker_name, worker in self.workers.items():
            demand = worker.demands.get(name)
            if demand is None or not demand.waiting:
                continue
            self.effects.append(SendRefuse(worker_name, name, reason.value, message, retry_after))
            demands = {**worker.demands, name: replace(demand, waiting=0, oldest_since=None)}
            self.workers[worker_name] = replace(worker, demands=MappingProxyType(demands))

    def suspect(self, name: str) -> None:
        """Ask the engine for a token, unless that question is under way."""
        record = self.models[name]
        if record.probing or record.epoch is None:
            return
        self.update(name, probing=True)
        self.effects.append(Probe(name, record.epoch, record.config))

    def can_forget(self, name: str) -> bool:
        phase = self.models[name].phase
        return isinstance(phase, Stopped) or (isinstance(phase, Failed) and not phase.held)

    def forget(self, name: str) -> None:
        """It is configured no longer, and nothing of it runs."""
        self.forget_reservation(name)
        self.wants.pop(name, None)
        del self.models[name]

    def state_of(self, name: str) -> ModelState:
        return self.models[name].state
