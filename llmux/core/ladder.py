"""Down the ladder: parked engines leave host memory, by its budget, by age, and when it is short.
One whose image has no room beside those that parked models come back from skips that rung.

A rung is reached without the GPU when it takes the processes further and leaves the weights as they
are, or is a stop. One engine goes down at a time, and none while any model moves: a switch comes
first. Going up is a wake.
"""

from __future__ import annotations

import math
from collections.abc import Container

from llmux.config.schema import Eviction, Process
from llmux.core.demand.usage import UNUSED
from llmux.core.operations import deepen, stop
from llmux.core.records import Draining, ModelRecord, Parked, Parking, coming
from llmux.core.room import Room
from llmux.core.states import MOVING
from llmux.core.transaction import Transaction

DEPTH = {process: depth for depth, process in enumerate(Process)}


def in_host_memory(eviction: Eviction) -> bool:
    return eviction.process not in (Process.CHECKPOINT, Process.STOP)


def rungs(record: ModelRecord) -> tuple[Eviction, ...]:
    """From the first; an operator's eviction has no rungs below it."""
    below = record.config.ladder if record.eviction_override is None else ()
    return (record.eviction, *below)


def may_choose(tx: Transaction, name: str) -> bool:
    """Has it more than one way to leave? Of models that leave together those without go first: what
    they take of the budget is then known to the others."""
    return len(rungs(tx.models[name])) > 1


def rung_below(tx: Transaction, name: str) -> Eviction | None:
    """The next one that the parked engine reaches where it is; None at the bottom. One whose image
    could not be written is not asked for it again."""
    record = tx.models[name]
    phase = record.phase
    assert isinstance(phase, Parked)
    for rung in rungs(record):
        if DEPTH[rung.process] <= DEPTH[phase.eviction.process]:
            continue
        if rung.process is Process.STOP:
            return rung
        if rung.process is Process.CHECKPOINT and not image_fits(tx, name):
            continue
        if rung.weights is phase.eviction.weights and not phase.reason:
            return rung
    return None


def used_bytes(tx: Transaction, leave_out: str = "") -> int:
    """Host memory of parked engines, and of those that are on their way there."""
    return sum(
        record.parked_bytes
        for name, record in tx.at(Parked, Parking, Draining)
        if name != leave_out
        and isinstance(record.phase, (Parked, Parking, Draining))
        and in_host_memory(record.phase.eviction)
    )


def image_fits(tx: Transaction, name: str) -> bool:
    """Is there room on disk for the model's image beside those that parked models come back from?
    Others are removed for it. Its size is what it took last, else its host memory."""
    budget = tx.config.checkpoint.max_bytes
    if budget is None:
        return True
    record = tx.models[name]
    room = budget - sum(
        other.image_bytes
        for other_name, other in tx.models.items()
        if other_name != name
        and isinstance(other.phase, (Parked, Parking, Draining))
        and other.phase.eviction.process is Process.CHECKPOINT
    )
    return room > 0 and (record.image_bytes or record.parked_bytes) <= room


def rung_for(tx: Transaction, name: str, eviction: Eviction) -> Eviction:
    """How a model that leaves its GPU is parked: by ``eviction``, or by the first rung below it
    that the budget allows."""
    record = tx.models[name]
    steps = rungs(record)
    if eviction != record.eviction or len(steps) == 1:
        return eviction
    budget = tx.config.policy.parked_max_bytes
    room = math.inf if budget is None else budget - used_bytes(tx, name)
    if tx.memory_short:
        room = 0.0
    for rung in steps[:-1]:
        if in_host_memory(rung):
            if room > 0 and record.parked_bytes <= room:
                return rung
        elif rung.process is Process.STOP or image_fits(tx, name):
            return rung
    return steps[-1]


def lower_parked(tx: Transaction, room: Room, waiting: Container[str]) -> None:
    budget = tx.config.policy.parked_max_bytes
    over = tx.memory_short or (budget is not None and used_bytes(tx) > budget)
    why = "host memory is short" if tx.memory_short else "policy.parked_max_bytes is exceeded"
    candidates: dict[str, Eviction] = {}
    for name, record in tx.at(Parked):
        assert isinstance(record.phase, Parked)
        if not in_host_memory(record.phase.eviction):
            continue
        if name in waiting or record.park_request is not None:
            continue
        if (rung := rung_below(tx, name)) is not None and (over or _is_old(tx, record)):
            candidates[name] = rung
    if not candidates or any(record.state in MOVING for record in tx.models.values()):
        return
    for name in sorted(candidates, key=lambda name: _value(tx, name, candidates[name])):
        if room.may_leave(name):
            if candidates[name].process is Process.STOP:
                stop(tx, name, why if over else "not used", grace=True)
            else:
                deepen(tx, name, candidates[name])
            return


def _is_old(tx: Transaction, record: ModelRecord) -> bool:
    """Parked for longer than the idle timeout, which counts for each rung."""
    limit = tx.config.idle_timeout(record.config)
    if not limit:
        return False
    due = record.phase.since + limit
    if tx.now >= due:
        return True
    tx.wake_at(due)
    return False


def _value(tx: Transaction, name: str, rung: Eviction) -> tuple[int, float, float, str]:
    """What its place in host memory is worth: seconds of waiting saved, per second and byte."""
    record = tx.models[name]
    phase = record.phase
    assert isinstance(phase, Parked)
    below = None if rung.process is Process.STOP else rung
    saved = tx.cost(name, coming(below)) - tx.cost(name, coming(phase.eviction))
    rate = tx.usage.get(name, UNUSED).rate_at(tx.now)
    worth = rate * max(0.0, saved) / max(1, record.parked_bytes)
    return record.config.priority, worth, record.last_active, name
