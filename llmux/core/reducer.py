"""``reduce(state, event, now) → (state, effects)``: every decision llmux makes, and nothing else.

No I/O, no clock, no logging. An event that does not concern the present state (an operation that is
no longer ours, a worker that answers late) is ignored on purpose, in the place that says so.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import assert_never

from llmux.config.schema import Config, Eviction, Process
from llmux.core.effects import Effect, SendRevoke
from llmux.core.events import (
    ConfigChanged,
    DemandChanged,
    EngineExited,
    EngineSuspect,
    Event,
    EvictionSet,
    ImageKnown,
    LoadAsked,
    ModeSet,
    OperationFinished,
    ParkAsked,
    ProbeFinished,
    Tick,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.core.plans import Outcome
from llmux.core.records import (
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
    Worker,
    WorkerDemand,
)
from llmux.core.schedule import schedule
from llmux.core.turn import Turn
from llmux.errors import InvariantError, Reason


def initial(config: Config, *, gpu_count: int, epoch_prefix: str, now: float = 0.0) -> State:
    """Nothing runs. ``epoch_prefix`` must differ between supervisor lives."""
    models = {name: ModelRecord(model, Stopped(now)) for name, model in config.models.items()}
    return State(config, gpu_count, epoch_prefix, models=MappingProxyType(models))


def reduce(state: State, event: Event, now: float) -> tuple[State, tuple[Effect, ...]]:
    turn = Turn(state, now)
    _apply(turn, event)
    schedule(turn)
    return turn.finish()


def _apply(turn: Turn, event: Event) -> None:
    match event:
        case WorkerJoined():
            _worker_joined(turn, event)
        case WorkerLeft():
            turn.workers.pop(event.worker, None)
        case DemandChanged():
            _demand_changed(turn, event)
        case WorkerDrained():
            worker = turn.workers.get(event.worker)
            if worker is not None and worker.holds.get(event.model) == event.epoch:
                turn.hold(event.worker, event.model, None)
        case EngineSuspect():
            record = turn.models.get(event.model)
            if record is not None and record.epoch == event.epoch:
                turn.suspect(event.model)
        case ProbeFinished():
            _probe_finished(turn, event)
        case EngineExited():
            _engine_exited(turn, event)
        case OperationFinished():
            _operation_finished(turn, event)
        case ImageKnown():
            if event.model in turn.models:
                turn.update(event.model, image=event.eviction)
        case LoadAsked():
            _load_asked(turn, event.model)
        case ParkAsked():
            _park_asked(turn, event.model, event.eviction)
        case EvictionSet():
            if event.model in turn.models:
                turn.update(event.model, eviction_override=event.eviction)
        case ModeSet():
            turn.manual, turn.pinned = event.manual, event.pinned
        case ConfigChanged():
            _config_changed(turn, event.config)
        case Tick():
            pass  # the scheduler looks at every deadline
        case _:
            assert_never(event)


# ---- workers ----------------------------------------------------------------------------------


def _worker_joined(turn: Turn, event: WorkerJoined) -> None:
    """Make what the worker holds and what is true agree."""
    former = turn.workers.get(event.worker, Worker())
    # one that comes back on a new connection has what it had in flight until it says otherwise
    turn.workers[event.worker] = replace(former, holds=MappingProxyType(dict(event.holds)))
    for name, epoch in event.holds.items():
        record = turn.models.get(name)
        if record is None or record.epoch != epoch:
            turn.hold(event.worker, name, None)
            turn.effects.append(SendRevoke(event.worker, name, epoch))
    for name, record in turn.models.items():
        phase = record.phase
        if isinstance(phase, Serving) and event.holds.get(name) != phase.epoch:
            turn.grant_to(event.worker, name, phase.epoch)
        elif isinstance(phase, Draining):
            # whether it holds the epoch or not: its "drained" comes after its present demand
            turn.hold(event.worker, name, phase.epoch)
            turn.effects.append(SendRevoke(event.worker, name, phase.epoch))


def _demand_changed(turn: Turn, event: DemandChanged) -> None:
    worker = turn.workers.get(event.worker)
    record = turn.models.get(event.model)
    if worker is None:
        return  # its connection is gone already
    demand = WorkerDemand(
        waiting=event.waiting,
        oldest_since=None if event.oldest_age is None else turn.now - event.oldest_age,
        in_flight=event.in_flight,
        progress=event.progress,
    )
    before = worker.demands.get(event.model, WorkerDemand())
    demands = {**worker.demands, event.model: demand}
    turn.workers[event.worker] = replace(worker, demands=MappingProxyType(demands))
    if record is None or record.removed:  # whether it runs still or not
        turn.refuse(
            event.model,
            Reason.UNKNOWN_MODEL,
            f'the model "{event.model}" does not exist',
        )
    if record is None:
        return
    if demand.progress != before.progress or (demand.in_flight and not before.in_flight):
        turn.update(event.model, progress_at=turn.now)
    if demand.waiting or demand.in_flight or before.in_flight:
        turn.update(event.model, last_active=turn.now)


# ---- engines ----------------------------------------------------------------------------------


def _probe_finished(turn: Turn, event: ProbeFinished) -> None:
    record = turn.models.get(event.model)
    if record is None or record.epoch != event.epoch:
        return  # parked or dead meanwhile
    if event.error is None:
        turn.update(event.model, probing=False, progress_at=turn.now)
    else:
        turn.crash(event.model, f"engine does not answer: {event.error}")


def _engine_exited(turn: Turn, event: EngineExited) -> None:
    record = turn.models.get(event.model)
    if record is None:
        return
    match record.phase:
        case Serving() | Draining():
            turn.crash(event.model, f"engine died: {event.description}")
        case Parked():
            turn.stop(event.model, f"engine died while parked: {event.description}", grace=False)
        case _:
            pass  # the operation under way sees it itself, and ends with what it saw


def _operation_finished(turn: Turn, event: OperationFinished) -> None:
    record = turn.models.get(event.model)
    if record is None or getattr(record.phase, "op", None) != event.op:
        return  # an operation of a former life
    name, phase, outcome = event.model, record.phase, event.outcome
    if outcome is Outcome.STUCK:
        turn.update(name, failures=record.failures + 1)
        turn.fail(name, f"engine cannot be killed: {event.detail}", held=True)
        return
    match phase, outcome:
        case ((Starting() | Waking()), Outcome.UP):
            turn.serve(name)
        case Starting(), Outcome.DOWN:
            turn.update(name, failures=record.failures + 1)
            turn.fail(name, event.detail)
        case Waking(), Outcome.DOWN:
            # the same waiters get a cold start: the room is still there
            turn.start(name, reason=f"wake failed: {event.detail}")
        case Parking(), Outcome.PARKED:
            turn.update(name, failures=0, park_request=None)
            turn.move(name, Parked(phase.eviction, turn.now))
            if record.park_request is not None:
                _park_asked(turn, name, record.park_request)
        case Parking(), Outcome.DOWN:
            turn.update(name, failures=0, park_request=None)
            turn.move(name, Stopped(turn.now, event.detail))
        case Stopping(), Outcome.DOWN:
            if phase.crashed and record.failures > 1:
                turn.fail(name, phase.reason)
            else:  # a first crash is answered by a restart as soon as somebody asks
                turn.move(name, Stopped(turn.now, phase.reason))
        case _:
            raise InvariantError(f"internal error: {name} is {phase.state}, operation {outcome}")
    if turn.models[name].removed and turn.can_forget(name):
        turn.forget(name)


# ---- operators --------------------------------------------------------------------------------


def _load_asked(turn: Turn, name: str) -> None:
    record = turn.models.get(name)
    if record is None or isinstance(record.phase, Serving):
        return
    turn.wants[name] = turn.now
    turn.update(name, park_request=None)
    if isinstance(record.phase, Failed):  # an operator who asks does not wait for the back-off
        turn.update(name, phase=replace(record.phase, until=turn.now))


def _park_asked(turn: Turn, name: str, eviction: Eviction | None) -> None:
    record = turn.models.get(name)
    if record is None:
        return
    turn.wants.pop(name, None)
    how = eviction or record.eviction
    match record.phase:
        case Serving():
            turn.drain(name, how, None)
        case Draining() as phase:
            turn.update(name, phase=replace(phase, eviction=how, wanted_by=None))
        case Starting() | Waking() | Parking():
            turn.update(name, park_request=how)
        case Parked(eviction=present) if how.process is Process.STOP and present != how:
            turn.stop(name, "an operator asked", grace=True)
        case Failed(held=False):
            turn.update(name, failures=0)
            turn.move(name, Stopped(turn.now, "an operator asked"))
        case _:
            pass


def _config_changed(turn: Turn, config: Config) -> None:
    turn.config = config
    turn.policy = turn.policy_of(config)
    for name, model in config.models.items():
        if name in turn.models:
            turn.update(name, config=model, removed=False)
        else:
            turn.models[name] = ModelRecord(model, Stopped(turn.now))
    for name in [n for n in turn.models if n not in config.models]:
        turn.refuse(name, Reason.UNKNOWN_MODEL, f'the model "{name}" was removed')
        turn.update(name, removed=True)
        if turn.can_forget(name):
            turn.forget(name)
        else:
            _park_asked(turn, name, Eviction(process=Process.STOP))
    if turn.pinned not in config.models:
        turn.pinned = None
