"""Streams that never end, around the core: a gateway, engines and an image store in virtual time.

Every model has the same number of requests all the time, each of which takes the same time. Only
what the core is told of happens as an event, so that hours pass in a few hundred of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmux.config.schema import Config, Eviction, Process
from llmux.core.effects import Effect, RunPlan, SendCut, SendGrant, SendRefuse, SendRevoke
from llmux.core.events import (
    DemandChanged,
    Event,
    GpuReleased,
    ImageKnown,
    OperationFinished,
    Tick,
    WorkerDrained,
    WorkerJoined,
)
from llmux.core.plans import Outcome, PlanKind
from llmux.core.records import ROUNDING, Draining, Parked, Parking, State, share_now
from llmux.core.reducer import initial, reduce_all

WORKER = "w"


@dataclass(frozen=True, slots=True)
class Stream:
    """``requests`` in the system at any time; ``answer``, ``up``, ``park``: seconds. Host memory
    and disk that the parked model takes."""

    requests: int
    answer: float
    up: float
    park: float
    host_bytes: int = 0
    image_bytes: int = 0


@dataclass(slots=True)
class Line:
    since: float  # when the oldest request began to wait, or when the model was granted
    held: str | None = None
    flying: int = 0
    completed: int = 0
    seen: float = 0.0  # completions are counted up to here
    answered: int = 0  # in this stay
    grants: int = 0
    cut_before: bool = False
    longest: float = 0.0


@dataclass(slots=True, repr=False)
class Endless:
    config: Config
    streams: Mapping[str, Stream]
    gpu_count: int = 1
    now: float = 0.0
    state: State = field(init=False)
    first: State = field(init=False)
    lines: dict[str, Line] = field(init=False)
    due: list[tuple[float, int, str, Callable[[str], None]]] = field(default_factory=list)
    running: dict[str, RunPlan] = field(default_factory=dict)
    images: dict[str, None] = field(default_factory=dict)  # the oldest first
    dumped: set[str] = field(default_factory=set)
    parked_once: set[str] = field(default_factory=set)
    happened: list[tuple[float, tuple[Event, ...]]] = field(default_factory=list)
    asked: list[Effect] = field(default_factory=list)
    number: int = 0

    def __repr__(self) -> str:
        """What was drawn; with every key of every model, Hypothesis would refuse to print it."""
        models = [
            (model.name, model.gpus, model.gpu_memory, str(model.eviction), model.ladder)
            for model in self.config.models.values()
        ]
        return (
            f"Endless({self.gpu_count} GPUs, {models}, {dict(self.streams)}, {self.config.policy})"
        )

    def __post_init__(self) -> None:
        self.first = initial(self.config, gpu_count=self.gpu_count, epoch_prefix="e")
        self.state = self.first
        self.lines = {name: Line(0.0) for name in self.streams}
        self.happen(WorkerJoined(WORKER, {}))
        for name in self.streams:
            self.report(name)

    # ---- time ---------------------------------------------------------------------------------

    def step(self) -> bool:
        """The next thing happens. False: nothing ever will."""
        times = [one[0] for one in self.due]
        if self.state.wakeup is not None:
            times.append(self.state.wakeup)
        if not times:
            return False
        self.now = max(self.now, min(times))
        ready = sorted(one for one in self.due if one[0] <= self.now)
        self.due = [one for one in self.due if one[0] > self.now]
        for _, _, name, act in ready:
            act(name)
        if self.state.wakeup is not None and self.state.wakeup <= self.now:
            held = [name for name, line in self.lines.items() if line.held is not None]
            self.happen(*map(self.demand, held), Tick())
        return True

    def later(self, seconds: float, name: str, act: Callable[[str], None]) -> None:
        self.number += 1
        self.due.append((self.now + seconds, self.number, name, act))

    def happen(self, *events: Event) -> None:
        """At once, as the supervisor's loop takes what has come."""
        self.happened.append((self.now, events))
        self.state, effects = reduce_all(self.state, events, self.now)
        self.asked += effects
        self.check_claims()
        for effect in effects:
            self.perform(effect)

    def check_claims(self) -> None:
        for gpu in range(self.gpu_count):
            claims = sum(share_now(r) for r in self.state.models.values() if gpu in r.gpus)
            assert claims <= 1.0 + ROUNDING, f"GPU {gpu} is over its capacity"

    # ---- the gateway --------------------------------------------------------------------------

    def report(self, name: str) -> None:
        self.happen(self.demand(name))

    def demand(self, name: str) -> DemandChanged:
        """What the gateway says now."""
        line, stream = self.lines[name], self.streams[name]
        places = self.config.gateway.max_in_flight
        if line.flying:
            rounds = math.floor((self.now - line.seen) / stream.answer + 1e-9)
            line.seen += rounds * stream.answer
            line.completed += rounds * min(line.flying, places)
            line.answered += rounds * min(line.flying, places)
        waiting = 0 if line.held is not None else stream.requests
        oldest = line.since if waiting else None
        return DemandChanged(
            WORKER, name, waiting, oldest, line.flying, line.completed, line.completed
        )

    def perform(self, effect: Effect) -> None:
        match effect:
            case SendGrant(_, name, epoch):
                self.granted(name, epoch)
            case SendRevoke(_, name, epoch):
                self.revoked(name, epoch)
            case SendCut(_, name):
                self.cut(name)
            case SendRefuse(_, name, reason):
                raise AssertionError(f"{name}: refused, {reason}")
            case RunPlan(name):
                assert name not in self.running, "two operations at once"
                self.running[name] = effect
                park = effect.plan.kind in (PlanKind.PARK, PlanKind.STOP)
                stream = self.streams[name]
                self.later(stream.park if park else stream.up, name, self.ends)
            case _:
                pass

    def granted(self, name: str, epoch: str) -> None:
        line = self.lines[name]
        if not line.flying:
            line.longest = max(line.longest, self.now - line.since)
            line.answered, line.seen = 0, self.now
            line.grants += 1
        line.held, line.flying = epoch, self.streams[name].requests
        self.report(name)
        self.later(self.streams[name].answer, name, self.report)  # the first answers

    def revoked(self, name: str, epoch: str) -> None:
        line, stream = self.lines[name], self.streams[name]
        if line.held != epoch:
            return
        phase = self.state.models[name].phase
        if isinstance(phase, Draining):
            self.check_budgets(name, phase.eviction)
        self.report(name)
        line.held, line.since = None, self.now
        places = self.config.gateway.max_in_flight
        rounds = math.ceil(line.flying / places)
        self.report(name)
        left = line.seen + rounds * stream.answer - self.now if rounds else 0.0
        self.later(max(left, 0.0), name, self.drained)

    def drained(self, name: str) -> None:
        """The last answer in flight has ended, unless the model was granted or cut meanwhile."""
        line = self.lines[name]
        phase = self.state.models[name].phase
        if line.held is not None or not isinstance(phase, Draining) or phase.cut_at is not None:
            return
        line.completed += line.flying
        line.answered += line.flying
        assert line.answered or not self.streams[name].requests, f"{name} came up for nothing"
        line.flying, line.cut_before = 0, False
        self.happen(self.demand(name), WorkerDrained(WORKER, name, phase.epoch))

    def cut(self, name: str) -> None:
        line = self.lines[name]
        phase = self.state.models[name].phase
        assert isinstance(phase, Draining)
        self.report(name)
        if not line.answered:
            assert not line.cut_before, f"{name} answers nothing: its drains are always cut"
        line.cut_before = not line.answered
        line.flying = 0
        self.happen(self.demand(name), WorkerDrained(WORKER, name, phase.epoch))

    # ---- engines and images -------------------------------------------------------------------

    def ends(self, name: str) -> None:
        effect = self.running.pop(name)
        outcome, eviction = effect.plan.success, effect.plan.eviction
        stream = self.streams[name]
        if effect.plan.dumps:
            self.happen(GpuReleased(name, effect.op))
        if effect.plan.restores and name not in self.images:
            self.happen(ImageKnown(name, None))
            outcome = Outcome.DOWN
        host = None
        if outcome is Outcome.PARKED and eviction is not None:
            if eviction.process is Process.CHECKPOINT:
                self.store(name)
                self.happen(ImageKnown(name, eviction, stream.image_bytes))
                self.dumped.add(name)
            else:
                host = stream.host_bytes
        self.happen(OperationFinished(name, effect.op, outcome, "ended", host_bytes=host))
        if host is not None:
            self.parked_once.add(name)

    def store(self, name: str) -> None:
        """Keep the image; others go, the oldest first, until all fit."""
        self.images.pop(name, None)
        self.images[name] = None
        limit = self.config.checkpoint.max_bytes
        while limit is not None and self.on_disk(self.images) > limit:
            oldest = next(iter(self.images))
            assert oldest != name
            del self.images[oldest]
            self.happen(ImageKnown(oldest, None))

    def on_disk(self, names: Sequence[str] | Mapping[str, None]) -> int:
        return sum(self.streams[name].image_bytes for name in names)

    def check_budgets(self, name: str, eviction: Eviction) -> None:
        """A model begins to leave: what is known of sizes fits beside the others parked so."""
        if not self.config.models[name].ladder or eviction.process is Process.STOP:
            return
        on_disk = eviction.process is Process.CHECKPOINT
        measured = self.dumped if on_disk else self.parked_once
        if name not in measured:
            return
        beside = [
            other
            for other, record in self.state.models.items()
            if not self.leaves_for_another_reason(other, name)
            and isinstance(record.phase, (Parked, Parking, Draining))
            and record.phase.eviction.process is not Process.STOP
            and (record.phase.eviction.process is Process.CHECKPOINT) == on_disk
            and other in measured
        ]
        if on_disk:
            limit = self.config.checkpoint.max_bytes
            used = self.on_disk(beside)
        else:
            limit = self.config.policy.parked_max_bytes
            used = sum(self.streams[other].host_bytes for other in beside)
        assert limit is None or used <= limit, f"{beside} over their budget"

    def leaves_for_another_reason(self, other: str, name: str) -> bool:
        """It has no choice, and began to leave only after the decision about ``name`` was made."""
        phase, own = self.state.models[other].phase, self.state.models[name].phase
        return (
            not self.config.models[other].ladder
            and isinstance(phase, Draining)
            and isinstance(own, Draining)
            and phase.since == own.since
            and phase.wanted_by != own.wanted_by
        )

    # ---- replay -------------------------------------------------------------------------------

    def check_replay(self, look: Callable[[State, State], None] | None = None) -> None:
        """The same events make the same state and ask for the same. ``look`` at each change."""
        state = self.first
        asked: list[Effect] = []
        for now, events in self.happened:
            before, (state, effects) = state, reduce_all(state, events, now)
            asked += effects
            if look is not None:
                look(before, state)
        assert asked == self.asked
        assert state == self.state
