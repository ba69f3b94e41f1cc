"""Who gets room now: decides from the whole state after every event, never on a snapshot.

A model that waits holds its place in line: room that is being made for it is not given to one
behind it. Nothing is woken on a GPU while what leaves it has not been seen gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llmux.config.schema import Eviction, Process
from llmux.core.effects import ReadAhead, RestoreAhead
from llmux.core.policy import Resident, Waiting
from llmux.core.records import (
    ROUNDING,
    Draining,
    Failed,
    ModelRecord,
    Parked,
    Reservation,
    Serving,
    Stopped,
    frees_memory,
    goes_into_ram,
    parked_share,
    share_after,
    share_now,
)
from llmux.core.turn import UNKNOWN_COST_SECS, Turn
from llmux.errors import Reason

Load = dict[int, float]  # GPU index → share

MANUAL_RETRY_SECS = 30.0  # nobody knows when an operator acts; OpenAI's SDKs heed up to a minute


def schedule(turn: Turn) -> None:
    waiting = _waiting(turn)
    _forget_reservations(turn, waiting)
    _cancel_drains(turn, waiting)
    _retry_kills(turn)
    reserved: Load = {}
    for name in turn.policy.order(list(waiting.values())):
        _consider(turn, waiting[name], reserved)
    for name in list(turn.models):
        if isinstance(turn.models[name].phase, Draining):
            turn.advance_drain(name)
    _watch_for_stalls(turn)


def _waiting(turn: Turn) -> dict[str, Waiting]:
    """Models that somebody waits for and that are not on their way already."""
    state = turn.view()
    found: dict[str, Waiting] = {}
    for name, record in turn.models.items():
        oldest = state.oldest_since(name)
        if oldest is None or record.removed:
            continue
        if turn.manual and name not in turn.wants and name != turn.pinned:
            if not isinstance(record.phase, Serving):
                turn.refuse(
                    name,
                    Reason.MANUAL_MODE,
                    f'model "{name}" is not resident and llmux is in manual mode',
                    MANUAL_RETRY_SECS,
                )
            continue
        cost = turn.costs.get(name, UNKNOWN_COST_SECS)
        found[name] = Waiting(name, state.waiting(name), oldest, cost)
    return found


def _forget_reservations(turn: Turn, waiting: dict[str, Waiting]) -> None:
    """A model that nobody waits for any more, and that has not begun, gives its place up."""
    for name in list(turn.reservations):
        resting = isinstance(turn.models[name].phase, (Stopped, Parked, Failed))
        if resting and name not in waiting:
            turn.forget_reservation(name)


def _cancel_drains(turn: Turn, waiting: dict[str, Waiting]) -> None:
    for name, record in list(turn.models.items()):
        phase = record.phase
        if (
            isinstance(phase, Draining)
            and phase.wanted_by is not None
            and phase.wanted_by not in waiting
            and phase.cut_at is None
            and not record.removed
        ):
            turn.undrain(name)


def _retry_kills(turn: Turn) -> None:
    """An engine that could not be killed keeps its GPU from everyone: try again."""
    for name, record in list(turn.models.items()):
        phase = record.phase
        if isinstance(phase, Failed) and phase.held:
            if turn.now >= phase.until:
                turn.stop(name, phase.message, grace=False, crashed=True)
            else:
                turn.wake_at(phase.until)


def _consider(turn: Turn, target: Waiting, reserved: Load) -> None:
    name = target.model
    record = turn.models[name]
    match record.phase:
        case Failed(until=until, message=message, held=held) if turn.now < until:
            if held or name not in turn.wants:
                turn.refuse(name, Reason.BACKING_OFF, message, until - turn.now)
                turn.wants.pop(name, None)
            return
        case Stopped() | Failed() | Parked():
            pass
        case _:
            return
    share = record.config.gpu_memory
    gpus = _place(turn, name, record, reserved)
    if gpus is None:
        turn.refuse(name, Reason.CANNOT_FIT, _cannot_fit(turn, record))
        turn.wants.pop(name, None)
        return
    if name not in turn.reservations:
        turn.reservations[name] = Reservation(decided_at=turn.now)
        way_back = turn.way_back(name)
        if way_back is not None and way_back.process is Process.CHECKPOINT:
            turn.effects.append(ReadAhead(name, record.config, gpus))
    if _fits(_load(turn, name, share_now), reserved, gpus, share):
        turn.update(name, gpus=gpus)
        if (eviction := turn.way_back(name)) is not None:
            turn.wake(name, eviction)
        else:
            turn.start(name)
        return
    if not _fits(_load(turn, name, share_after), reserved, gpus, share):
        _make_room(turn, target, gpus, share, reserved)
    coming = _fits(_load(turn, name, share_after), reserved, gpus, share)
    _restore_ahead(turn, name, gpus, coming=coming)
    _add(reserved, gpus, share)


def _make_room(
    turn: Turn, target: Waiting, gpus: tuple[int, ...], share: float, reserved: Load
) -> None:
    victims = _choose_victims(turn, target.model, gpus, share, reserved)
    serving = [v for v in victims if isinstance(turn.models[v].phase, Serving)]
    earliest = max(
        (turn.policy.earliest(target, _resident(turn, v)) for v in serving), default=turn.now
    )
    if turn.now < earliest:
        turn.wake_at(earliest)
        return
    for victim, eviction in victims.items():
        if victim in serving:
            turn.drain(victim, eviction, target.model)
        else:  # parked, and its residue is in the way
            turn.stop(victim, f'room for model "{target.model}"', grace=True)
    reservation = turn.reservations[target.model]
    turn.reservations[target.model] = replace(
        reservation, decided_at=turn.now, victims=(*reservation.victims, *victims)
    )


def _restore_ahead(turn: Turn, name: str, gpus: tuple[int, ...], *, coming: bool) -> None:
    """While the room is ``coming``, not while its owner may still keep it: a restored engine takes
    host memory."""
    way_back = turn.way_back(name)
    if not coming or way_back is None or way_back.process is not Process.CHECKPOINT:
        turn.drop_ahead(name)
        return
    reservation = turn.reservations[name]
    if reservation.ahead:
        return
    turn.reservations[name] = replace(reservation, ahead=True)
    into_ram = tuple(n for n, r in turn.models.items() if goes_into_ram(r))
    deadline = turn.config.policy.request_timeout_secs
    config = turn.models[name].config
    turn.effects.append(RestoreAhead(name, config, gpus, into_ram, deadline))


def _own_way(record: ModelRecord) -> Eviction:
    """The model's own way of parking, or stop when that would leave its memory where it is."""
    return record.eviction if frees_memory(record.config, record.eviction) else _stopped(record)


def _stopped(record: ModelRecord) -> Eviction:
    return Eviction(record.eviction.weights, Process.STOP)


def _choose_victims(
    turn: Turn, target: str, gpus: tuple[int, ...], share: float, reserved: Load
) -> dict[str, Eviction]:
    """The fewest, in the policy's order, whose going makes room, and how each is to go. Parked
    residues may be in the way too: then nothing less than a stop helps. Empty: nothing helps."""
    for how in (_own_way, _stopped):
        chosen = _victims_going(turn, target, gpus, share, reserved, how)
        if chosen:
            return chosen
    return {}


def _victims_going(
    turn: Turn,
    target: str,
    gpus: tuple[int, ...],
    share: float,
    reserved: Load,
    how: Callable[[ModelRecord], Eviction],
) -> dict[str, Eviction]:
    load = _load(turn, target, share_after)
    on_these = {
        name: record
        for name, record in turn.models.items()
        if name not in (target, turn.pinned) and set(record.gpus) & set(gpus)
    }
    serving = [_resident(turn, n) for n, r in on_these.items() if isinstance(r.phase, Serving)]
    residues = sorted(
        (r.phase.since, n)
        for n, r in on_these.items()
        if isinstance(r.phase, Parked) and share_now(r) > ROUNDING
    )
    gains: dict[str, float] = {}
    for name in [*turn.policy.victims(serving), *(n for _, n in residues)]:
        if _fits(load, reserved, gpus, share):
            break
        record = turn.models[name]
        is_serving = isinstance(record.phase, Serving)
        kept = parked_share(record.config, how(record)) if is_serving else 0.0
        gains[name] = share_after(record) - kept
        _add(load, record.gpus, -gains[name])
    if not _fits(load, reserved, gpus, share):
        return {}
    for name in list(gains):  # whoever turned out not to be needed stays
        again = dict(load)
        _add(again, turn.models[name].gpus, gains[name])
        if _fits(again, reserved, gpus, share):
            load = again
            del gains[name]
    return {name: how(turn.models[name]) for name in gains}


def _add(load: Load, gpus: tuple[int, ...], share: float) -> None:
    for gpu in gpus:
        load[gpu] = load.get(gpu, 0.0) + share


def _resident(turn: Turn, name: str) -> Resident:
    record = turn.models[name]
    assert isinstance(record.phase, Serving)
    return Resident(name, record.phase.since, turn.view().in_flight(name), record.last_active)


def _load(turn: Turn, without: str, share_of: Callable[[ModelRecord], float]) -> Load:
    """Σ of shares per GPU over all models but ``without``."""
    load: Load = {}
    for name, record in turn.models.items():
        if name == without:
            continue
        _add(load, record.gpus, share_of(record))
    return load


def _fits(load: Load, reserved: Load, gpus: tuple[int, ...], share: float) -> bool:
    return all(
        load.get(gpu, 0.0) + reserved.get(gpu, 0.0) + share <= 1.0 + ROUNDING for gpu in gpus
    )


def _place(turn: Turn, name: str, record: ModelRecord, reserved: Load) -> tuple[int, ...] | None:
    """The GPUs it is to live on; None when this host does not have them."""
    if isinstance(record.phase, Parked):
        return record.gpus  # a parked engine cannot move
    wanted = record.config.gpus
    if isinstance(wanted, tuple):
        fits_host = all(gpu < turn.base.gpu_count for gpu in wanted)
        return wanted if fits_host else None
    if wanted > turn.base.gpu_count:
        return None
    reservation_load = _load(turn, name, share_after)
    by_load = sorted(
        range(turn.base.gpu_count),
        key=lambda gpu: (reservation_load.get(gpu, 0.0) + reserved.get(gpu, 0.0), gpu),
    )
    return tuple(sorted(by_load[:wanted]))


def _cannot_fit(turn: Turn, record: ModelRecord) -> str:
    wanted = record.config.gpus
    text = f"GPUs {list(wanted)}" if isinstance(wanted, tuple) else f"{wanted} GPUs"
    return (
        f'model "{record.config.name}" wants {text}, but this host has {turn.base.gpu_count};'
        " change `gpus` in its configuration"
    )


def _watch_for_stalls(turn: Turn) -> None:
    """A busy engine from which no byte has come for too long is asked for a sign of life."""
    state = turn.view()
    for name, record in list(turn.models.items()):
        limit = record.config.stall_timeout_secs
        if not limit or record.epoch is None or record.probing or not state.in_flight(name):
            continue
        due = record.progress_at + limit
        if turn.now >= due:
            turn.suspect(name)
        else:
            turn.wake_at(due)
