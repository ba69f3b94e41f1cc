"""``reduce(state, event, now) → (state, effects)``: every decision llmux makes, and nothing else.

No I/O, no clock, no logging. An event that does not concern the present state (a stale operation, a
late answer of a worker) is ignored on purpose, in the place that says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import assert_never

from llmux.config.schema import Config, Eviction, Process
from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.effects import Effect, SendRevoke, Verdict
from llmux.core.events import (
    AwakeSeen,
    ConfigChanged,
    DemandChanged,
    EngineExited,
    EngineSuspect,
    Event,
    EvictionSet,
    GpuReleased,
    ImageKnown,
    KeepAliveSet,
    LoadAsked,
    LoadWithdrawn,
    MemoryPressure,
    ModeSet,
    OperationFinished,
    ParkAsked,
    ParkWithdrawn,
    PinSet,
    ProbeFinished,
    ResidueSeen,
    Tick,
    TrialSet,
    WorkerDrained,
    WorkerJoined,
    WorkerLeft,
)
from llmux.core.operations import (
    SEARCH_DEATHS,
    crash,
    fail,
    park,
    release_gpu,
    serve,
    start,
    stop,
    undrain,
)
from llmux.core.plans import Outcome
from llmux.core.policies.base import PolicyOf
from llmux.core.policies.choose import policy_for
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
    coming,
    leaving,
    moves_memory,
)
from llmux.core.schedule import schedule
from llmux.core.transaction import Transaction
from llmux.errors import InvariantError, Reason


def initial(
    config: Config,
    *,
    gpu_count: int,
    epoch_prefix: str,
    now: float = 0.0,
    policy_of: PolicyOf | None = None,
) -> State:
    """Nothing runs. ``epoch_prefix`` must differ between supervisor lives. ``policy_of``: what
    decides in place of the configured policy, in a simulation."""
    models = {name: ModelRecord(model, Stopped(now)) for name, model in config.models.items()}
    return State(
        config,
        gpu_count,
        epoch_prefix,
        models=MappingProxyType(models),
        policy_of=policy_of or policy_for,
    )


def reduce(state: State, event: Event, now: float) -> tuple[State, tuple[Effect, ...]]:
    return reduce_all(state, (event,), now)


def reduce_all(
    state: State, events: Iterable[Event], now: float
) -> tuple[State, tuple[Effect, ...]]:
    """Apply the events in their order, then schedule once."""
    tx = Transaction(state, now)
    for event in events:
        _apply(tx, event)
    schedule(tx)
    return tx.finish()


def _apply(tx: Transaction, event: Event) -> None:
    match event:
        case WorkerJoined():
            _worker_joined(tx, event)
        case WorkerLeft():
            tx.remove_worker(event.worker)
        case DemandChanged():
            _demand_changed(tx, event)
        case WorkerDrained():
            worker = tx.workers.get(event.worker)
            if worker is not None and worker.holds.get(event.model) == event.epoch:
                tx.hold(event.worker, event.model, None)
        case EngineSuspect():
            record = tx.models.get(event.model)
            if record is not None and record.epoch == event.epoch:
                tx.suspect(event.model)
        case ProbeFinished():
            _probe_finished(tx, event)
        case EngineExited():
            _engine_exited(tx, event)
        case OperationFinished():
            _operation_finished(tx, event)
        case GpuReleased():
            release_gpu(tx, event.model, event.op)
        case ResidueSeen() | AwakeSeen():
            record = tx.models.get(event.model)
            if record is not None and getattr(record.phase, "op", None) == event.op:
                awake = event.share if isinstance(event, AwakeSeen) else record.awake
                residue = event.share if isinstance(event, ResidueSeen) else record.residue
                tx.put(replace(record, awake=awake, residue=residue))
        case ImageKnown():
            if (record := tx.models.get(event.model)) is not None:
                size = event.disk_bytes or record.image_bytes
                tx.put(replace(record, image=event.eviction, image_bytes=size))
        case LoadAsked():
            _load_asked(tx, event)
        case ParkAsked():
            _park_asked(tx, event)
        case LoadWithdrawn():
            tx.unwant(event.model, Reason.CANCELLED, "the order was cancelled")
        case ParkWithdrawn():
            _park_withdrawn(tx, event.model)
        case EvictionSet():
            if (record := tx.models.get(event.model)) is not None:
                tx.put(replace(record, eviction_override=event.eviction))
        case TrialSet():
            if (record := tx.models.get(event.model)) is not None:
                tx.put(replace(record, trial=event.eviction))
        case ModeSet():
            tx.manual, tx.pinned = event.manual, event.pinned
        case PinSet():
            tx.pin(event.model, event.until)
        case MemoryPressure():
            tx.memory_short = event.short
        case KeepAliveSet():
            if (record := tx.models.get(event.model)) is not None:
                tx.put(replace(record, keep_alive=event.seconds))
        case ConfigChanged():
            _config_changed(tx, event.config)
        case Tick():
            pass  # the scheduler looks at every deadline
        case _:
            assert_never(event)


# ---- workers ----------------------------------------------------------------------------------


def _worker_joined(tx: Transaction, event: WorkerJoined) -> None:
    """Make what the worker holds and what is true agree."""
    former = tx.workers.get(event.worker, Worker())
    # one that comes back on a new connection has what it had in flight until it says otherwise
    tx.set_worker(event.worker, replace(former, holds=MappingProxyType(dict(event.holds))))
    for name, epoch in event.holds.items():
        record = tx.models.get(name)
        if record is None or record.epoch != epoch:
            tx.hold(event.worker, name, None)
            tx.emit(SendRevoke(event.worker, name, epoch))
    for name, record in tx.models.items():
        phase = record.phase
        if isinstance(phase, Serving) and event.holds.get(name) != phase.epoch:
            tx.grant_to(event.worker, name, phase.epoch)
        elif isinstance(phase, Draining):
            # whether it holds the epoch or not: its "drained" comes after its present demand
            tx.hold(event.worker, name, phase.epoch)
            tx.emit(SendRevoke(event.worker, name, phase.epoch))


def _demand_changed(tx: Transaction, event: DemandChanged) -> None:
    worker = tx.workers.get(event.worker)
    record = tx.models.get(event.model)
    if worker is None:
        return  # its connection is gone already
    demand = WorkerDemand(
        event.waiting, event.oldest_since, event.in_flight,
        event.progress, event.completed, event.repeated,
    )  # fmt: skip
    before = worker.demands.get(event.model, WorkerDemand())
    tx.set_demand(event.worker, event.model, demand)
    if record is None or record.removed:  # whether its engine runs still or not
        tx.refuse(
            event.model,
            Reason.UNKNOWN_MODEL,
            f'the model "{event.model}" does not exist',
        )
    if record is None:
        return
    if demand.completed > before.completed and isinstance(record.phase, (Serving, Draining)):
        # It serves: what killed the engines before was one of its requests, not its start.
        record = replace(record, failures=0)
    answers = demand.progress != before.progress
    progressed = answers or (demand.in_flight and not before.in_flight)
    used = demand.waiting or demand.in_flight or before.in_flight
    if progressed or used:
        tx.put(
            replace(
                record,
                progress_at=tx.now if progressed else record.progress_at,
                bytes_at=tx.now if answers else record.bytes_at,
                last_active=tx.now if used else record.last_active,
            )
        )


# ---- engines ----------------------------------------------------------------------------------


def _probe_finished(tx: Transaction, event: ProbeFinished) -> None:
    record = tx.models.get(event.model)
    if record is None or record.epoch != event.epoch:
        return  # parked or dead meanwhile
    if event.error is None:
        tx.put(replace(record, probing=False, progress_at=tx.now))
    elif event.stalled and record.bytes_at > record.probed_at:
        # Bytes came while it was watched: it has not hung for so long as the limit.
        tx.put(replace(record, probing=False, progress_at=record.bytes_at))
    else:
        reason = f"engine does not answer: {event.error}"
        crash(tx, event.model, reason, hung=event.stalled)


def _engine_exited(tx: Transaction, event: EngineExited) -> None:
    record = tx.models.get(event.model)
    if record is None:
        return
    match record.phase:
        case Serving() | Draining():
            crash(tx, event.model, f"engine died: {event.description}")
        case Parked():
            stop(tx, event.model, f"engine died while parked: {event.description}", grace=False)
        case _:
            pass  # the running operation sees it itself, and ends with what it saw


def _operation_finished(tx: Transaction, event: OperationFinished) -> None:
    record = tx.models.get(event.model)
    if record is None or getattr(record.phase, "op", None) != event.op:
        return  # stale: not the operation that runs now
    name, phase, outcome = event.model, record.phase, event.outcome
    if outcome is Outcome.STUCK:
        tx.put(replace(record, failures=record.failures + 1))
        fail(tx, name, f"engine cannot be killed: {event.detail}", held=True)
        return
    match phase, outcome:
        case Starting(), Outcome.UP:
            tx.learn_cost(name, coming(None), tx.now - phase.since)
            tx.put(replace(record, start_secs=tx.now - phase.since))
            serve(tx, name)
        case Waking(), Outcome.UP:
            tx.learn_cost(name, coming(phase.eviction), tx.now - phase.since)
            serve(tx, name)
        case Starting(), Outcome.DOWN:
            tx.put(replace(record, failures=record.failures + 1))
            fail(tx, name, event.detail)
        case Waking(), Outcome.DOWN:
            # the same waiters get a cold start: the room is still there
            reason = f"wake failed: {event.detail}"
            if _another_moves(tx, record):
                tx.move(name, Stopped(tx.now, reason))
            else:
                start(tx, name, reason=reason)
        case Parking(), Outcome.PARKED:
            if phase.released_at is None:
                tx.learn_cost(name, leaving(phase.eviction), tx.now - phase.since)
            known = record.parked_bytes if event.host_bytes is None else event.host_bytes
            tx.put(replace(record, failures=0, park_request=None, parked_bytes=known))
            tx.move(name, Parked(event.eviction or phase.eviction, tx.now, event.detail))
            if record.park_request is not None:
                park(tx, record.config.name, record.park_request)
        case Parking(), Outcome.DOWN:
            if phase.eviction.process is Process.STOP:
                tx.learn_cost(name, leaving(phase.eviction), tx.now - phase.since)
            tx.put(replace(record, failures=0, park_request=None))
            tx.move(name, Stopped(tx.now, event.detail))
        case Stopping(), Outcome.DOWN:
            at_once = SEARCH_DEATHS if tx.demand(name).repeated else 1
            if phase.crashed and record.failures > at_once:
                fail(tx, name, f'cannot keep model "{name}" up: {phase.reason}')
            else:  # a first crash is answered by a restart with the next request
                tx.move(name, Stopped(tx.now, phase.reason))
        case _:
            raise InvariantError(f"internal error: {name} is {phase.state}, operation {outcome}")
    if tx.models[name].removed and tx.can_forget(name):
        tx.forget(name)


def _another_moves(tx: Transaction, record: ModelRecord) -> bool:
    """Does another model have a memory transition under way on the model's GPUs?"""
    return any(
        moves_memory(other) and set(other.gpus) & set(record.gpus)
        for other in tx.models.values()
        if other.config.name != record.config.name
    )


# ---- operators --------------------------------------------------------------------------------


def _load_asked(tx: Transaction, event: LoadAsked) -> None:
    name = event.model
    record = tx.models.get(name)
    if record is None or record.removed:
        tx.answer(
            event.order,
            Verdict.REFUSED,
            f'the model "{name}" does not exist',
            Reason.UNKNOWN_MODEL,
        )
        return
    if isinstance(record.phase, Serving):
        tx.answer(event.order, Verdict.ALREADY)
        return
    tx.want(name)
    tx.put(replace(record, park_request=None))
    if isinstance(record.phase, Failed):  # an operator's order overrides the back-off
        tx.put(replace(tx.models[name], phase=replace(record.phase, until=tx.now)))
    tx.answer_load_when_decided(event.order, name)


def _park_asked(tx: Transaction, event: ParkAsked) -> None:
    record = tx.models.get(event.model)
    if record is None:
        tx.answer(
            event.order,
            Verdict.REFUSED,
            f'the model "{event.model}" does not exist',
            Reason.UNKNOWN_MODEL,
        )
        return
    if isinstance(record.phase, Failed) and record.phase.held:
        tx.answer(event.order, Verdict.REFUSED, record.phase.message, Reason.START_FAILED)
        return
    acts = park(tx, event.model, event.eviction or record.eviction)
    tx.answer(event.order, Verdict.ACCEPTED if acts else Verdict.ALREADY)


def _park_withdrawn(tx: Transaction, name: str) -> None:
    record = tx.models.get(name)
    if record is None or record.removed:
        return
    tx.put(replace(record, park_request=None))
    phase = record.phase
    if isinstance(phase, Draining) and phase.wanted_by is None and phase.cut_at is None:
        undrain(tx, name)


def _config_changed(tx: Transaction, config: Config) -> None:
    tx.configure(config)
    for name, model in config.models.items():
        if (record := tx.models.get(name)) is not None:
            if record.config != model:  # what was seen is of another engine
                record = replace(record, residue=None, awake=None)
            tx.put(replace(record, config=model, removed=False))
        else:
            tx.add(ModelRecord(model, Stopped(tx.now)))
    for name in [n for n in tx.models if n not in config.models]:
        tx.refuse(name, Reason.UNKNOWN_MODEL, f'the model "{name}" was removed')
        tx.put(replace(tx.models[name], removed=True))
        if tx.can_forget(name):
            tx.forget(name)
        else:
            park(tx, name, Eviction(process=Process.STOP))
    if tx.pinned not in config.models:
        tx.pinned = None
