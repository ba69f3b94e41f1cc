"""Which model gets room: decides from the whole state after every batch of events.

For each model that is waited for, in the policy's order:

1. manual mode, and neither an operator wants it nor is it pinned: its requests are refused.
2. it failed and its back-off runs: its requests are refused.
3. it serves or moves: nothing to decide.
4. this host does not have its GPUs: refused.
5. there is room now: wake it, or start it cold; while a memory transition of another model is under
   way on its GPUs it comes next there.
6. there will be room once the present operations have ended: wait, restore ahead.
7. room that is not reserved in front of it could never be enough: wait in the queue.
8. models could leave for it, but the policy lets them stay: look again at the policy's time.
9. models leave for it: they drain, or stop where only a parked residue is in the way.
10. only models that stay resident (pinned, never_evict) are in its way: an operator's order is
   refused at once.
11. it is parked where 8 to 10 are the choices, and other GPUs have room: it is stopped, to start
   there, where that costs less than the switches at home.

A waiting model keeps its place: room that it waits for (5 to 9, 11) is reserved, and not given to a
model behind it. For one that only models that stay are in the way of (10) nothing is: it may wait
for ever, and is the first again once they go. Nothing is woken on a GPU before what leaves it was
seen gone.

A GPU has one memory transition at a time: a start until the model serves, a wake, a park, a stop.
Models that leave go before models that come. Only the end of an engine that died or hangs does not
wait; it is no choice of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmux.config.schema import Process
from llmux.core.demand.usage import UNUSED
from llmux.core.effects import ReadAhead, RestoreAhead
from llmux.core.ladder import lower_parked, may_choose, rung_for
from llmux.core.operations import advance_drain, drain, give_up, start, stop, undrain, wake
from llmux.core.placement.choice import Choice
from llmux.core.policies.base import Resident, Waiting
from llmux.core.records import (
    ROUNDING,
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Reservation,
    Serving,
    Starting,
    Stopped,
    Waking,
    coming,
    goes_into_ram,
    keeps_gpu,
    leaving,
    share_now,
)
from llmux.core.room import GPUs, Room
from llmux.core.timeouts import end_overdue, park_idle, retry_kills, watch_for_stalls
from llmux.core.transaction import Transaction
from llmux.core.waiting import find_waiting
from llmux.errors import Reason

AT_REST = (Stopped, Parked, Failed)
# Not sooner: a policy's time recedes as it comes near while no answer ends, as they seem longer.
LOOK_AGAIN_SECS = 0.1


def schedule(tx: Transaction) -> None:
    end_overdue(tx)
    waiting = find_waiting(tx)
    _forget_reservations(tx, waiting)
    _cancel_drains(tx, waiting)
    retry_kills(tx)
    park_idle(tx, waiting)
    room = Room(tx.models, tx.base.gpu_count, tx.config.exclusive)
    _give_up_starts(tx, waiting, room)
    _let_leave(tx, room)
    away = [one for name, one in waiting.items() if _is_away(tx.models[name])]
    least = min([tx.models[one.model].config.gpu_memory for one in away], default=0.0)
    choice = Choice(tx, room)
    room.keep([name for name, _ in tx.at(Serving) if away and tx.is_kept(name)])
    full = False
    for name in _in_order(tx, away):
        full = full or room.is_reserved(least)
        # 7 or 10, as for all behind it, which may be hundreds
        if full and name in tx.reservations and name not in tx.wants:
            tx.drop_ahead(name)
        else:
            _consider(tx, waiting[name], away, choice)
    _let_leave(tx, room)
    lower_parked(tx, room, waiting)
    watch_for_stalls(tx)


def _in_order(tx: Transaction, away: list[Waiting]) -> Sequence[str]:
    """The policy's order, but no model comes back before the one that it left for, whatever their
    priorities: both switches would have been for nothing."""
    order = tx.policy.order(away, tx.now)
    if not any(reservation.victims for reservation in tx.reservations.values()):
        return order
    place = {name: float(index) for index, name in enumerate(order)}
    for target in order:
        reservation = tx.reservations.get(target)
        for victim in reservation.victims if reservation is not None else ():
            if victim in place:
                place[victim] = max(place[victim], place[target] + 0.5)
    return sorted(order, key=place.__getitem__)


def _let_leave(tx: Transaction, room: Room) -> None:
    """Go on with drains and with operators' stops of parked models."""
    for name, record in tx.at(Draining, Parked):
        match record.phase:
            case Draining():
                advance_drain(tx, name, may_move=room.may_leave(name))
                room.refresh(name)
            case Parked() if record.park_request is not None and room.may_leave(name):
                tx.put(replace(record, park_request=None))
                stop(tx, name, "an operator asked", grace=True)
                room.refresh(name)


def _forget_reservations(tx: Transaction, waiting: dict[str, Waiting]) -> None:
    """A model that is waited for no more, and that has not begun, gives its place up."""
    for name in [name for name in tx.reservations if name not in waiting]:
        if isinstance(tx.models[name].phase, AT_REST):
            tx.forget_reservation(name)


def _cancel_drains(tx: Transaction, waiting: dict[str, Waiting]) -> None:
    for name, record in tx.at(Draining):
        phase = record.phase
        assert isinstance(phase, Draining)
        if (
            phase.wanted_by is not None
            and phase.wanted_by not in waiting
            and phase.cut_at is None
            and not record.removed
        ):
            undrain(tx, name)


def _give_up_starts(tx: Transaction, waiting: dict[str, Waiting], room: Room) -> None:
    """A start or a wake that nothing waits for ends when another model waits for its room: a start
    at once, unless it is nearly done by its usual duration, a wake once it takes longer than usual.
    Both get give_up_start_secs to end by themselves."""
    coming_up = tx.at(Starting, Waking)
    idle = [name for name, _ in coming_up if name not in waiting and not tx.is_kept(name)]
    needed = [
        set(gpus)
        for name in (waiting if idle else ())
        if _is_away(record := tx.models[name])
        and (gpus := room.place(record)) is not None
        and not room.fits_after(name, gpus, record.config.gpu_memory)
    ]
    for name in idle:
        record = tx.models[name]
        if not any(gpus & set(record.gpus) for gpus in needed):
            continue
        patience = _patience(tx, record)
        if patience is not None and patience[0] <= tx.now < patience[1]:
            tx.wake_at(patience[1])
            continue
        give_up(tx, name, "no request waits for it, and others need the room")
        room.refresh(name)


def _patience(tx: Transaction, record: ModelRecord) -> tuple[float, float] | None:
    """From when to when a start or wake that nothing waits for may go on, others waiting."""
    grace = tx.config.policy.give_up_start_secs
    phase = record.phase
    if isinstance(phase, Starting):
        if record.start_secs is None:
            return None
        due = phase.since + record.start_secs
        return due - grace, due + grace
    assert isinstance(phase, Waking)
    # Its end would cost the parked state, and it should be up within seconds.
    return phase.since, phase.since + tx.cost(record.config.name, coming(phase.eviction)) + grace


def _is_away(record: ModelRecord) -> bool:
    """At rest and not resident; else (3)."""
    return isinstance(record.phase, AT_REST)


def _consider(tx: Transaction, target: Waiting, away: list[Waiting], choice: Choice) -> None:
    name, room = target.model, choice.room
    record = tx.models[name]
    match record.phase:
        case Failed(until=until, message=message) if tx.now < until:  # 2
            if name in tx.wants:  # preloaded: an order does not wait for the back-off
                tx.wake_at(until)
            else:
                tx.refuse(name, Reason.BACKING_OFF, message, until - tx.now)
            return
        case Parked() if record.park_request is not None:  # it will be stopped first
            return
        case _ if not _is_away(record):  # its residue was in the way of one in front
            return
        case _:
            pass
    share = record.config.gpu_memory
    gpus = room.place(record, choice)
    if gpus is None:  # 4
        message = room.cannot_fit(record)
        tx.refuse(name, Reason.CANNOT_FIT, message)
        tx.unwant(name, Reason.CANNOT_FIT, message)
        return
    if name not in tx.reservations:
        tx.reserve(name, Reservation(decided_at=tx.now, since=tx.now))
    if room.fits_now(name, gpus, share):  # 5
        _read_ahead(tx, name, gpus)
        eviction = tx.way_back(name)
        if room.may_come(gpus) or (eviction is not None and keeps_gpu(eviction)):
            tx.put(replace(record, gpus=gpus))
            if eviction is not None:
                wake(tx, name, eviction)
            else:
                start(tx, name)
            room.refresh(name)
            return
        room.comes_next(gpus)
    elif room.could_fit(name, gpus, share):  # else 7
        _read_ahead(tx, name, gpus)
        if not room.fits_after(name, gpus, share) and not _make_room(  # else 6
            tx, target, away, gpus, share, choice
        ):
            tx.drop_ahead(name)
            return  # 10
    if name not in tx.reservations or tx.models[name].phase is not record.phase:
        return  # refused just now, or moved
    coming = room.fits_after(name, gpus, share)
    if coming:
        tx.read_weights(name, gpus)
    _restore_ahead(tx, name, gpus, coming=coming)
    room.reserve(name, gpus, share)


def _make_room(
    tx: Transaction,
    target: Waiting,
    away: list[Waiting],
    gpus: GPUs,
    share: float,
    choice: Choice,
) -> bool:
    """Returns whether there may be room, sooner or later, as long as all stay that are kept."""
    room = choice.room
    others = [n for n in room.neighbours(target.model, gpus) if n not in (target.model, tx.pinned)]
    serving = [
        _resident(tx, n)
        for n in others
        if isinstance(tx.models[n].phase, Serving) and not tx.is_kept(n)
    ]
    victims = room.victims(
        target.model, gpus, share, tx.policy.victims(serving), _residues(tx, others)
    )
    leave = [resident for resident in serving if resident.model in victims]
    if (leave or not victims) and choice.move(target, leave):  # 11
        return True
    if not victims:
        return not _stay_away(tx, target.model, gpus, share, room)  # 10
    rivals = [one for one in away if _may_live_on(tx.models[one.model], gpus)]
    earliest = max(
        (tx.policy.earliest(target, resident, rivals, tx.now) for resident in leave),
        default=tx.now,
    )
    if tx.now < earliest:  # 8
        tx.wake_at(max(earliest, tx.now + LOOK_AGAIN_SECS))
        return True
    left: list[str] = []
    for victim in sorted(victims, key=lambda one: may_choose(tx, one)):  # 9
        if isinstance(tx.models[victim].phase, Serving):
            drain(tx, victim, rung_for(tx, victim, victims[victim]), target.model)
        elif room.may_leave(victim):
            stop(tx, victim, f'room for model "{target.model}"', grace=True)
        else:
            continue
        room.refresh(victim)
        left.append(victim)
    reservation = tx.reservations[target.model]
    tx.reserve(
        target.model,
        replace(
            reservation,
            decided_at=reservation.decided_at if reservation.victims else tx.now,
            victims=(*reservation.victims, *left),
        ),
    )
    return True


def _stay_away(tx: Transaction, name: str, gpus: GPUs, share: float, room: Room) -> bool:
    """No model can leave for it. Those that make no room for others are noted, where there would be
    room without them; returns whether there would. An operator's order is refused at once where
    only they are in the way; requests wait on, since a pin may end."""
    ordered = name in tx.wants and not tx.demand(name).waiting
    others = sorted(room.neighbours(name, gpus) - {name})
    serving = [n for n in others if isinstance(tx.models[n].phase, Serving)]
    kept = [n for n in serving if tx.is_kept(n)]
    behind = bool(kept and room.victims(name, gpus, share, serving, _residues(tx, others)))
    if behind and not tx.reservations[name].behind:
        tx.reserve(name, replace(tx.reservations[name], behind=tuple(kept)))
    if not ordered or not kept or any(n not in kept and not _is_away(tx.models[n]) for n in others):
        return behind  # what comes or goes now may make room later
    if not room.victims(name, gpus, share, kept, _residues(tx, others)):
        return behind
    who = ", ".join(kept) + (" stay" if len(kept) > 1 else " stays")
    message = f"{who} resident, pinned or by never_evict (llmux unpin {' '.join(kept)})"
    tx.unwant(name, Reason.PINNED, message)
    tx.forget_reservation(name)
    return True


def _residues(tx: Transaction, names: list[str]) -> list[str]:
    """Those of the models that are parked and hold GPU memory, longest parked first."""
    parked = [
        (record.phase.since, name)
        for name in names
        if isinstance((record := tx.models[name]).phase, Parked) and share_now(record) > ROUNDING
    ]
    return [name for _, name in sorted(parked)]


def _read_ahead(tx: Transaction, name: str, gpus: GPUs) -> None:
    """Order the image of a model that is next in the queue into the page cache, once."""
    reservation, way_back = tx.reservations[name], tx.way_back(name)
    if reservation.read or way_back is None or way_back.process is not Process.CHECKPOINT:
        return
    tx.reserve(name, replace(reservation, read=True))
    tx.emit(ReadAhead(name, tx.models[name].engine, gpus))


def _restore_ahead(tx: Transaction, name: str, gpus: GPUs, *, coming: bool) -> None:
    """Only while the room is ``coming``, not while its owner may keep it: a restored engine takes
    host memory."""
    way_back = tx.way_back(name)
    if not coming or way_back is None or way_back.process is not Process.CHECKPOINT:
        tx.drop_ahead(name)
        return
    reservation = tx.reservations[name]
    if reservation.ahead:
        return
    tx.reserve(name, replace(reservation, ahead=True))
    into_ram = tuple(n for n, r in tx.models.items() if goes_into_ram(r))
    deadline = tx.config.policy.request_timeout_secs
    tx.emit(RestoreAhead(name, tx.models[name].engine, gpus, into_ram, deadline))


def _resident(tx: Transaction, name: str) -> Resident:
    record = tx.models[name]
    assert isinstance(record.phase, Serving)
    demand = tx.demand(name)
    usage = tx.usage.get(name, UNUSED)
    eviction = record.eviction
    back = None if eviction.process is Process.STOP else eviction
    return Resident(
        name,
        record.phase.since,
        demand.in_flight + demand.waiting,  # those that waited have been granted
        record.last_active,
        tx.cost(name, leaving(eviction)),
        tx.cost(name, coming(back)),
        usage.rate_at(tx.now),
        usage.service,
        tx.config.gateway.max_in_flight,
        record.config.priority,
    )


def _may_live_on(record: ModelRecord, gpus: GPUs) -> bool:
    wanted = record.gpus if isinstance(record.phase, Parked) else record.config.gpus
    return isinstance(wanted, int) or not frozenset(wanted).isdisjoint(gpus)
