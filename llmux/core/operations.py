"""What can be done to one model: start, wake, serve, drain, park, stop, crash, fail.

Each function makes one transition on a ``Transaction`` and asks for what goes with it. Whether it
is time for that was decided before: by the scheduler, by an operator, or by what was observed.
"""

from __future__ import annotations

from dataclasses import replace

from llmux.config.schema import Eviction, Process
from llmux.core.demand.workers import busy, holders
from llmux.core.effects import SendCut, SendRevoke, SwitchFinished
from llmux.core.plans import deepen_plan, park_plan, start_plan, stop_plan, wake_plan
from llmux.core.records import (
    Draining,
    Failed,
    Parked,
    Parking,
    Serving,
    Starting,
    Stopped,
    Stopping,
    Waking,
    is_resident,
    keeps_gpu,
    leaving,
    share_now,
)
from llmux.core.transaction import Transaction
from llmux.errors import Reason

CUT_GRACE_SECS = 5.0  # a worker that does not answer a cut for so long is ignored from then on
UNCUT_DRAINS = 10.0  # drain timeouts for the answers of a model that was cut in its last turn
HEALTHY_SECS = 60.0  # an engine that served so long was not failing to start
# Deaths in a row, without one answer in between, after which an engine is started at once where
# requests are repeated: the gateway finds those that kill it (gateway/admission/suspects.py), and
# may meet many of them first. One that dies still more often is bad, whatever it is sent.
SEARCH_DEATHS = 20

# ---- bringing up ------------------------------------------------------------------------------


def start(tx: Transaction, name: str, *, reason: str = "") -> None:
    """Cold start. The room is there."""
    op = tx.operation()
    record = tx.models[name]
    tx.drop_ahead(name)
    tx.put(replace(record, switched_secs=0.0))
    tx.move(name, Starting(op, tx.now, reason))
    if (reservation := tx.reservations.get(name)) is not None:
        room = tx.now if reservation.room_at is None else reservation.room_at
        tx.reserve(name, replace(reservation, room_at=room, cold=True))
    tx.run(name, op, start_plan(record.config, tx.config.startup_timeout(record.config)))


def wake(tx: Transaction, name: str, eviction: Eviction) -> None:
    """Bring the model back from ``eviction``, which is how it was parked. The room is there."""
    op = tx.operation()
    tx.move(name, Waking(op, tx.now, eviction))
    if (reservation := tx.reservations.get(name)) is not None:
        # the wake takes over what was restored ahead
        tx.reserve(name, replace(reservation, room_at=tx.now, ahead=False))
    tx.run(name, op, wake_plan(tx.models[name].config, eviction))


def serve(tx: Transaction, name: str) -> None:
    """Up and verified: grant it to every worker on a new epoch."""
    epoch = tx.epoch()
    tx.move(name, Serving(epoch, tx.now))
    wanted = tx.models[name].park_request
    tx.put(
        replace(
            tx.models[name],
            probing=False,
            progress_at=tx.now,
            last_active=tx.now,
            park_request=None,
        )
    )
    tx.grant(name, epoch)
    reservation = tx.fulfil(name)
    if reservation is not None:
        room = tx.now if reservation.room_at is None else reservation.room_at
        drained = room if reservation.drained_at is None else reservation.drained_at
        decided = reservation.decided_at
        if reservation.behind and not reservation.victims:
            decided = room
        if reservation.victims and not reservation.cold:
            record = tx.models[name]
            spent = tx.now - decided
            tx.put(replace(record, switched_secs=record.switched_secs + spent))
        tx.emit(
            SwitchFinished(
                name,
                reservation.victims,
                reservation.cold,
                decided,
                drained,
                room,
                tx.now,
                reservation.behind,
                decided - reservation.since if reservation.behind else 0.0,
            )
        )
    if wanted is not None:
        drain(tx, name, wanted, None)


# ---- taking down ------------------------------------------------------------------------------


def drain(
    tx: Transaction, name: str, eviction: Eviction, wanted_by: str | None, *, reason: str = ""
) -> None:
    """Revoke every grant; requests in flight may finish until the deadline."""
    record = tx.models[name]
    serving = record.phase
    assert isinstance(serving, Serving)
    policy = tx.config.policy
    patience = policy.drain_timeout_secs if policy.drain_before_switch else 0.0
    if record.cut and wanted_by is not None:
        # else two models whose answers last longer would cut each other for ever
        patience = max(UNCUT_DRAINS * policy.drain_timeout_secs, policy.request_timeout_secs)
    tx.move(
        name,
        Draining(
            serving.epoch,
            serving.since,
            tx.now,
            tx.now + patience,
            eviction,
            wanted_by,
            reason=reason,
        ),
    )
    for worker in holders(tx.workers, name, serving.epoch):
        tx.emit(SendRevoke(worker, name, serving.epoch))


def undrain(tx: Transaction, name: str) -> None:
    """The room is not wanted any more: serve on, on a new epoch."""
    draining = tx.models[name].phase
    assert isinstance(draining, Draining)
    epoch = tx.epoch()
    tx.move(name, Serving(epoch, draining.serving_since))
    tx.grant(name, epoch)


def advance_drain(tx: Transaction, name: str, *, may_move: bool) -> None:
    """Park when nothing is in flight, cut when the deadline has passed. Not while it may not move:
    a cut would gain nothing."""
    record = tx.models[name]
    draining = record.phase
    assert isinstance(draining, Draining)
    if not may_move and not keeps_gpu(draining.eviction):
        return
    working = busy(tx.workers, name, draining.epoch)
    if working and draining.cut_at is None and tx.now >= draining.deadline:
        for worker in working:
            tx.emit(SendCut(worker, name, draining.epoch))
        draining = replace(draining, cut_at=tx.now)
        record = replace(record, phase=draining)
        tx.put(record)
    if draining.cut_at is not None and tx.now >= draining.cut_at + CUT_GRACE_SECS:
        tx.release_holds(name)
        working = []
    if working:
        cut_at = draining.cut_at
        tx.wake_at(draining.deadline if cut_at is None else cut_at + CUT_GRACE_SECS)
        return
    op = tx.operation()
    tx.put(replace(record, cut=draining.cut_at is not None))
    tx.move(name, Parking(op, tx.now, draining.eviction, draining.wanted_by))
    wanting = draining.wanted_by
    if wanting is not None and (reservation := tx.reservations.get(wanting)) is not None:
        tx.reserve(wanting, replace(reservation, drained_at=tx.now))
    tx.run(name, op, park_plan(record.config, draining.eviction))


def release_gpu(tx: Transaction, name: str, op: int) -> None:
    """The claim ends here; what the operation still does needs no GPU. What leaving cost others is
    the time until now. A stale operation's release means nothing."""
    record = tx.models.get(name)
    if record is None or not isinstance(record.phase, Parking) or record.phase.op != op:
        return
    phase = record.phase
    if phase.released_at is None:
        if phase.share is None:
            tx.learn_cost(name, leaving(phase.eviction), tx.now - phase.since)
        tx.move(name, replace(phase, released_at=tx.now))


def deepen(tx: Transaction, name: str, eviction: Eviction) -> None:
    """Park the parked model further down, by ``eviction``, without waking it."""
    record = tx.models[name]
    parked = record.phase
    assert isinstance(parked, Parked)
    op = tx.operation()
    tx.move(name, Parking(op, tx.now, eviction, share=share_now(record)))
    tx.run(name, op, deepen_plan(record.config, parked.eviction, eviction))


def stop(tx: Transaction, name: str, reason: str, *, grace: bool, crashed: bool = False) -> None:
    op = tx.operation()
    tx.drop_ahead(name)
    record = tx.models[name]
    was_parked = not is_resident(record)
    tx.move(name, Stopping(op, tx.now, reason, share_now(record), crashed, was_parked))
    tx.run(name, op, stop_plan(tx.models[name].config, grace=grace))


def give_up(tx: Transaction, name: str, reason: str) -> None:
    """End a start or a wake that is not wanted any more, also one that hangs. The executor cancels
    it before it ends the engine; an image on disk stays."""
    assert isinstance(tx.models[name].phase, (Starting, Waking))
    tx.forget_reservation(name)
    stop(tx, name, reason, grace=False)


def crash(tx: Transaction, name: str, reason: str, *, hung: bool = False) -> None:
    """The serving engine died or hangs: give its requests back, clean its unit up. What an engine
    hangs on is not repeated: the next one might hang on it, too."""
    record = tx.models[name]
    phase = record.phase
    assert isinstance(phase, (Serving, Draining))
    for worker in holders(tx.workers, name, phase.epoch):
        tx.emit(SendRevoke(worker, name, phase.epoch, dead=not hung))
        if hung:
            tx.emit(SendCut(worker, name, phase.epoch, reason))
    tx.release_holds(name)
    since = phase.since if isinstance(phase, Serving) else phase.serving_since
    failures = 1 if tx.now - since >= HEALTHY_SECS else record.failures + 1
    tx.put(replace(record, failures=failures, probing=False))
    stop(tx, name, reason, grace=False, crashed=True)


def fail(tx: Transaction, name: str, message: str, *, held: bool = False) -> None:
    """Back off, longer with each of its failures, this one counted; requests that wait are refused
    now."""
    record = tx.models[name]
    tx.put(replace(record, park_request=None))
    policy, longer = tx.config.policy, min(record.failures - 1, 20)
    delay = min(policy.backoff_secs * 2**longer, policy.backoff_max_secs)
    share = share_now(record) if held else 0.0
    was_parked = not is_resident(record)
    tx.move(name, Failed(tx.now, tx.now + delay, message, held, share, was_parked))
    tx.unwant(name, Reason.START_FAILED, message)
    tx.forget_reservation(name)
    tx.refuse(name, Reason.START_FAILED, message, delay)


def park(tx: Transaction, name: str, how: Eviction) -> bool:
    """Park or stop on an operator's order. Returns False when the model is down already."""
    record = tx.models[name]
    tx.unwant(name, Reason.START_FAILED, "an operator had it parked")
    match record.phase:
        case Serving():
            drain(tx, name, how, None)
        case Draining() as phase:
            tx.put(replace(record, phase=replace(phase, eviction=how, wanted_by=None)))
        case Starting() | Waking() if how.process is Process.STOP:
            tx.refuse(name, Reason.START_FAILED, f'the start of model "{name}" was given up')
            give_up(tx, name, "an operator asked")
        case Starting() | Waking() | Parking():
            tx.put(replace(record, park_request=how))
        case Parked(eviction=present) if how.process is Process.STOP and present != how:
            tx.put(replace(record, park_request=how))  # the scheduler: when its GPUs are quiet
        case Failed(held=False):
            tx.put(replace(record, failures=0))
            tx.move(name, Stopped(tx.now, "an operator asked"))
        case Stopping():
            pass  # under way
        case _:
            return False
    return True
