"""A discrete-event simulation of gateway, engines and clients around the real core.

The reducer and the scheduler decide as they do in the supervisor; this module plays everything
else by the rules that the gateway and the executor follow: one worker, engines with a number of
places, operations that take what ``Costs`` says.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llmux.config.schema import Config, PolicyConfig, Process
from llmux.core.effects import (
    Effect,
    Probe,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
    SwitchFinished,
)
from llmux.core.events import (
    DemandChanged,
    Event,
    ImageKnown,
    OperationFinished,
    ProbeFinished,
    Tick,
    WorkerDrained,
    WorkerJoined,
)
from llmux.core.plans import Outcome, PlanKind
from llmux.core.policies.base import Policy
from llmux.core.records import Failed, State
from llmux.core.reducer import initial, reduce_all
from llmux.errors import LlmuxError
from llmux.sim.costs import Costs
from llmux.sim.trace import Arrival

WORKER = "sim"
PATIENCE_SECS = 20_000.0  # after the last arrival what is still open counts as unserved


@dataclass(slots=True, eq=False)
class Request:
    arrival: Arrival
    began: float | None = None  # service
    ended: float | None = None
    cuts: int = 0
    attempts: int = 0
    asked: float = 0.0  # the last attempt
    refused: str = ""  # why it got no answer

    @property
    def wait(self) -> float | None:
        return None if self.began is None else self.began - self.arrival.at


@dataclass(slots=True)
class Engine:
    """One model as the gateway sees it. ``queue`` waits for the model or for a place."""

    places: int
    held: str | None = None
    queue: deque[Request] = field(default_factory=deque)
    serving: set[Request] = field(default_factory=set)
    draining: str | None = None
    completed: int = 0
    progress: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """What was on a GPU: from, to, model, and its state."""

    began: float
    ended: float
    model: str
    state: str
    gpus: tuple[int, ...]


@dataclass(slots=True)
class Result:
    requests: list[Request]
    spans: list[Span]
    switches: list[SwitchFinished]
    events: list[dict[str, Any]]  # as the supervisor publishes them, for the timeline
    ended: float
    gpu_count: int


class Simulation:
    """Runs one trace to its end. ``policy``: decides in place of the configured one.
    ``report_secs``: the gateway reports demand at most so often; 0 = whenever it changes."""

    def __init__(
        self,
        config: Config,
        trace: Sequence[Arrival],
        costs: Costs,
        *,
        gpu_count: int = 1,
        seed: int = 0,
        policy: Callable[[PolicyConfig], Policy] | None = None,
        timeouts: bool = True,
        record: bool = False,
        report_secs: float = 0.0,
    ) -> None:
        for arrival in trace:
            if arrival.model not in config.models:
                raise LlmuxError(f'cannot simulate: model "{arrival.model}" is not configured')
        self.now = 0.0
        self._costs = costs
        self._random = random.Random(seed)  # noqa: S311  # which operations fail
        self._timeout = config.policy.request_timeout_secs if timeouts else None
        self._record = record
        self._interval = report_secs
        self._reported, self._report_due = -report_secs, False
        places = config.gateway.max_in_flight
        self._engines = {name: Engine(places) for name in config.models}
        self._requests = [Request(arrival) for arrival in trace]
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._events: list[Event] = [WorkerJoined(WORKER, {})]
        self._changed: dict[str, None] = {}
        self._since: dict[str, tuple[float, str, tuple[int, ...]]] = {}
        self._open = len(trace)
        self._end = max((arrival.at for arrival in trace), default=0.0) + PATIENCE_SECS
        self.state: State = initial(
            config, gpu_count=gpu_count, epoch_prefix="sim", policy_of=policy
        )
        self._result = Result(self._requests, [], [], [], 0.0, gpu_count)

    def run(self) -> Result:
        arrivals = iter(self._requests)
        upcoming = next(arrivals, None)
        self._decide()
        while self._open:
            times = [self._heap[0][0]] if self._heap else []
            if upcoming is not None:
                times.append(upcoming.arrival.at)
            if self.state.wakeup is not None:
                times.append(self.state.wakeup)
            if not times or min(times) > self._end:
                self._abandon()
                break
            self.now = max(self.now, min(times))
            while upcoming is not None and upcoming.arrival.at <= self.now:
                self._arrive(upcoming)
                upcoming = next(arrivals, None)
            while self._heap and self._heap[0][0] <= self.now:
                heapq.heappop(self._heap)[2]()
            if self.state.wakeup is not None and self.state.wakeup <= self.now:
                self._events.append(Tick())
            self._decide()
        self._result.ended = max((r.ended or 0.0 for r in self._requests), default=0.0)
        for name in list(self._since):
            self._close_span(name)
        return self._result

    def _abandon(self) -> None:
        for request in self._requests:
            if request.ended is None:
                self._give_up(request, "never served")

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, act))

    # ---- the core -----------------------------------------------------------------------------

    def _decide(self) -> None:
        """Report what has changed and let the core decide, until nothing new comes of it."""
        if not self._events and self.now < self._reported + self._interval:
            if self._changed and not self._report_due:
                self._report_due = True
                self._at(self._reported + self._interval, lambda: None)
            return
        self._reported, self._report_due = self.now, False
        while self._changed or self._events:
            for name in self._changed:
                self._events.append(self._demand(name))
            self._changed.clear()
            events, self._events = self._events, []
            before = self.state
            self.state, effects = reduce_all(self.state, events, self.now)
            if self._record:
                self._note_spans(before)
            for effect in effects:
                self._perform(effect)

    def _demand(self, name: str) -> DemandChanged:
        engine = self._engines[name]
        flying, queued = len(engine.serving), len(engine.queue)
        if self._record:
            self._say(name, type="queue", waiting=queued)
        if engine.held is not None:  # those that wait for a place only count as in flight
            waiting, since, flying = 0, None, flying + queued
        else:
            waiting, since = queued, engine.queue[0].asked if queued else None
        return DemandChanged(
            WORKER, name, waiting, since, flying, engine.progress, engine.completed
        )

    def _perform(self, effect: Effect) -> None:
        match effect:
            case RunPlan():
                seconds = self._costs.of(effect.model).of(effect.plan.kind)
                self._at(self.now + seconds, partial(self._finish, effect))
            case SendGrant(_, model, epoch):
                self._engines[model].held = epoch
                self._fill(model)
            case SendRevoke(_, model, epoch, dead):
                self._revoke(model, epoch, dead=dead)
            case SendCut(_, model):
                self._cut(model)
            case SendRefuse(_, model, reason):
                engine = self._engines[model]
                while engine.queue:
                    self._give_up(engine.queue.popleft(), reason)
                self._changed[model] = None
            case Probe(model, epoch):
                self._events.append(ProbeFinished(model, epoch, None))
            case SwitchFinished():
                self._result.switches.append(effect)
                if self._record:
                    self._note_switch(effect)
            case _:
                pass

    def _finish(self, effect: RunPlan) -> None:
        outcome = effect.plan.success
        comes = effect.plan.kind in (PlanKind.START, PlanKind.WAKE)
        if comes and self._random.random() < self._costs.of(effect.model).failures:
            outcome = Outcome.DOWN
        eviction = effect.plan.eviction
        if eviction is not None and eviction.process is Process.CHECKPOINT:
            if outcome is Outcome.PARKED:
                self._events.append(ImageKnown(effect.model, eviction))
            elif effect.plan.restores and outcome is Outcome.DOWN:
                self._events.append(ImageKnown(effect.model, None))
        self._events.append(OperationFinished(effect.model, effect.op, outcome, "simulated"))

    # ---- requests -----------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        model = request.arrival.model
        request.asked = self.now
        self._engines[model].queue.append(request)
        self._fill(model)
        limit = request.arrival.deadline or self._timeout
        if limit is not None and request.began is None:
            self._at(request.arrival.at + limit, partial(self._expire, request))

    def _fill(self, model: str) -> None:
        """Requests that wait go to the engine, as far as it has places."""
        engine = self._engines[model]
        self._changed[model] = None
        while engine.held is not None and engine.queue and len(engine.serving) < engine.places:
            request = engine.queue.popleft()
            request.began = self.now
            engine.serving.add(request)
            self._at(
                self.now + request.arrival.service, partial(self._serve, request, request.attempts)
            )

    def _serve(self, request: Request, attempt: int) -> None:
        """The engine has answered, unless the request was cut meanwhile."""
        if attempt != request.attempts:
            return
        model = request.arrival.model
        engine = self._engines[model]
        engine.serving.remove(request)
        engine.completed += 1
        engine.progress += 1
        request.ended = self.now
        self._open -= 1
        self._fill(model)
        self._drained(model)

    def _expire(self, request: Request) -> None:
        if request.began is None and not request.refused:
            self._engines[request.arrival.model].queue.remove(request)
            self._give_up(request, "wait_expired")
            self._changed[request.arrival.model] = None

    def _give_up(self, request: Request, reason: str) -> None:
        request.refused = reason
        request.ended = self.now
        self._open -= 1

    def _revoke(self, model: str, epoch: str, *, dead: bool) -> None:
        engine = self._engines[model]
        if engine.held == epoch:
            engine.held = None
        engine.draining = epoch
        if dead:
            self._requeue(model)
        self._changed[model] = None
        self._drained(model)

    def _cut(self, model: str) -> None:
        for request in self._engines[model].serving:
            request.cuts += 1
        self._requeue(model)
        self._drained(model)

    def _requeue(self, model: str) -> None:
        """Clients repeat what was cut: all its work is lost."""
        engine = self._engines[model]
        lost = sorted(engine.serving, key=lambda request: request.arrival.at)
        engine.serving.clear()
        for request in lost:
            request.attempts += 1
            request.asked = self.now
            request.began = None
            engine.queue.append(request)
        self._changed[model] = None

    def _drained(self, model: str) -> None:
        engine = self._engines[model]
        if engine.draining is not None and not engine.serving:
            self._events.append(self._demand(model))
            self._events.append(WorkerDrained(WORKER, model, engine.draining))
            engine.draining = None

    # ---- what is noted ------------------------------------------------------------------------

    def _note_spans(self, before: State) -> None:
        for name, record in self.state.models.items():
            former = before.models[name]
            if record.phase is not former.phase or name not in self._since:
                self._close_span(name)
                self._since[name] = (self.now, record.state.value, record.gpus)
            if record.state is not former.state:
                failed = record.phase.message if isinstance(record.phase, Failed) else ""
                self._say(
                    name,
                    type="transition",
                    to=record.state.value,
                    reason=failed,
                    gpus=list(record.gpus),
                    duration_secs=round(record.phase.since - former.phase.since, 4),
                    **{"from": former.state.value},
                )

    def _note_switch(self, switch: SwitchFinished) -> None:
        self._say(
            switch.model,
            type="switch",
            victims=list(switch.victims),
            cold=switch.cold,
            drain_secs=switch.drained_at - switch.decided_at,
            park_secs=switch.room_at - switch.drained_at,
            up_secs=switch.serving_at - switch.room_at,
            duration_secs=switch.serving_at - switch.decided_at,
        )

    def _say(self, model: str, **facts: Any) -> None:
        number = len(self._result.events) + 1
        self._result.events.append({"id": number, "time": self.now, "model": model} | facts)

    def _close_span(self, name: str) -> None:
        if (opened := self._since.pop(name, None)) is None:
            return
        began, state, gpus = opened
        if self.now > began and gpus and state not in ("stopped", "parked", "failed"):
            self._result.spans.append(Span(began, self.now, name, state, gpus))
