"""Why a model is in its state, and what it waits for: a reading of the state, for people. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmux.core.operations import CUT_GRACE_SECS
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
    moves_memory,
)

NAMED = 3  # of the models that are waited for; the others are counted

_COMING = {"starting": "which starts", "waking": "which wakes"}


@dataclass(frozen=True, slots=True)
class Why:
    """``text``: one line, empty when the state says it all. ``at_most_secs``: after this time the
    models in ``waits_for`` have no more requests in flight."""

    text: str = ""
    waits_for: tuple[str, ...] = ()
    at_most_secs: float | None = None


def explain(state: State, name: str, now: float) -> Why:
    record = state.models[name]
    match record.phase:
        case Failed(message=message, until=until, held=held):
            first = message.partition("\n")[0].rstrip(" :;")
            left = max(0.0, until - now)
            again = "its end is tried again" if held else "no new start"
            return Why(
                f"{first}; {again} {'in' if held else 'for'} {left:.0f} s" if left else first
            )
        case Draining() as phase:
            purpose = phase.reason or "parked by order"
            if phase.wanted_by is not None:
                purpose = f"makes room for {phase.wanted_by}"
            left = _drain_left(phase, now)
            requests = in_flight(state.in_flight(name))
            return Why(f"{purpose}: {requests}, at most {left:.0f} s", at_most_secs=left)
        case Parking(wanted_by=str() as wanted_by):
            return Why(f"makes room for {wanted_by}")
        case Starting() | Waking() if record.park_request is not None:
            return Why("parked by order as soon as it serves")
        case Stopped() | Parked() if _is_wanted(state, name):
            return _waiting(state, name, record, now)
        case Starting(reason=reason) | Stopping(reason=reason) | Stopped(reason=reason):
            return Why(reason.partition("\n")[0])
        case Parked(reason=reason):
            return Why(reason.partition("\n")[0])
        case _:
            return Why()


def in_flight(count: int) -> str:
    return f"{count} request{'s' if count != 1 else ''} in flight"


def stays(state: State, record: ModelRecord, now: float) -> bool:
    """Does the model make no room for others?"""
    name = record.config.name
    pinned = name == state.pinned or state.pins.get(name, now) > now
    return pinned or record.config.never_evict


def _is_wanted(state: State, name: str) -> bool:
    return name in state.wants or name in state.reservations or state.waiting(name) > 0


def _drain_left(phase: Draining, now: float) -> float:
    ends = phase.deadline if phase.cut_at is None else phase.cut_at + CUT_GRACE_SECS
    return max(0.0, ends - now)


def _waiting(state: State, name: str, record: ModelRecord, now: float) -> Why:
    """Of a model at rest: what stands between it and its GPUs, what leaves already first."""
    gpus = record.gpus if isinstance(record.phase, Parked) else record.config.gpus
    near = {
        other: one
        for other, one in state.models.items()
        if other != name and (isinstance(gpus, int) or set(gpus) & set(one.gpus))
    }

    def those(fits: Callable[[ModelRecord], bool]) -> tuple[str, ...]:
        return tuple(other for other, one in near.items() if fits(one))

    drains = {other: one.phase for other, one in near.items() if isinstance(one.phase, Draining)}
    if drains:
        requests = in_flight(sum(map(state.in_flight, drains)))
        left = max(_drain_left(phase, now) for phase in drains.values())
        text = f"waits for {_listed(drains)}: {requests}, at most {left:.0f} s"
        return Why(text, tuple(drains), left)
    if leaving := those(lambda one: isinstance(one.phase, (Parking, Stopping))):
        return Why(f"waits for {_listed(leaving)} to release its GPU memory", leaving)
    if coming := those(moves_memory):
        how = _COMING[near[coming[0]].state.value]
        return Why(f"waits for {_listed(coming)}, {how} on the same GPU", coming)
    if kept := those(lambda one: isinstance(one.phase, Serving) and stays(state, one, now)):
        return Why(f"waits for {_listed(kept)}, which stays resident (pinned or never_evict)", kept)
    if serving := those(lambda one: isinstance(one.phase, Serving)):
        return Why(f"waits for its turn; {_listed(serving)} may serve longer", serving)
    ahead = those(lambda one: one.config.name in state.reservations)
    return Why(f"waits behind {_listed(ahead)}" if ahead else "waits for its turn", ahead)


def _listed(names: Iterable[str]) -> str:
    first, rest = list(names)[:NAMED], list(names)[NAMED:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")
