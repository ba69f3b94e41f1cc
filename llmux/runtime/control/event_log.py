"""The events of the last hour: transitions and switches, and how long queues were.

``events`` are what operators follow; the timeline adds the lengths of queues. Each is appended to a
bounded file, from which the next supervisor goes on: numbers grow over restarts.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from time import time
from typing import Annotated, Any, Final

from llmux.core.effects import SwitchFinished
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
)
from llmux.errors import Reason, Refused, StateFileError
from llmux.ports import EventStore
from llmux.protocol import MAX_LINE
from llmux.runtime.control.order_book import Order
from llmux.runtime.control.watchers import Watchers
from llmux.typed_json import Within, fits

log = logging.getLogger("llmux")

KEEP_SECS: Final = 3600.0
KEEP_EVENTS: Final = 10_000  # some 5 MB; an event is about 300 bytes
TAIL_EVENTS: Final = 256  # answered when no first event is named
PAGE_BYTES: Final = MAX_LINE // 2
QUEUE_SECS: Final = 1.0  # at most one length per queue in this time
QUEUE: Final = "queue"

Event = dict[str, Any]

# What a kept event may say: numbers that others can read, and count on from.
_SECS = Annotated[float, Within(0, 1e9)]
_FIELDS: Final[Mapping[str, Any]] = {
    "id": Annotated[int, Within(0, 2**52)],
    "time": Annotated[float, Within(0, 1e11)],
    "model": str,
    "type": str,
    "from": str | None,
    "to": str,
    "reason": str,
    "gpus": list[int],
    "duration_secs": _SECS | None,
    "victims": list[str],
    "cold": bool,
    "drain_secs": float,  # may begin before it was decided
    "park_secs": float,
    "up_secs": float,
    "waiting": Annotated[int, Within(0, 10**9)],
    "order": Annotated[int, Within(0, 2**52)],
    "verb": str,
    "by": str | None,
    "result": str,
}
_COMMON: Final = frozenset({"id", "time", "model", "type"})


class EventLog:
    """A listener of the loop: every transition and every switch, as one object each. ``store``:
    keeps them for the next supervisor; without one they end with this process."""

    def __init__(self, watchers: Watchers, store: EventStore | None = None) -> None:
        self._watchers = watchers
        self._store = store
        self._unwritten = False  # the last event could not be stored
        self._number = itertools.count(1)
        self.recent: deque[Event] = deque(maxlen=KEEP_EVENTS)
        self._lengths: dict[str, tuple[float, int]] = {}  # of queues: (when noted, waiting)

    def resume(self) -> None:
        """Go on from the events of the former supervisor."""
        if self._store is None:
            return
        try:
            kept = self._store.load()
        except StateFileError as error:
            log.warning("%s", error)
            return
        former = [event for event in map(_event, kept) if event is not None]
        if len(former) < len(kept):
            log.warning("%d events of before are damaged, and left out", len(kept) - len(former))
        self.recent.extend(former)
        self._forget_old(time())
        self._number = itertools.count(1 + max((event["id"] for event in former), default=0))

    def adopted(self, state: State) -> None:
        """Say what changed while no supervisor looked: the former one's last word on each model is
        not what was found. Queues are empty until the workers have reconnected."""
        last: dict[str, str] = {}
        waiting: dict[str, int] = {}
        for event in self.recent:
            if event["type"] == "transition":
                last[event["model"]] = event.get("to", "")
            elif event["type"] == "removed":
                last.pop(event["model"], None)
            elif event["type"] == QUEUE:
                waiting[event["model"]] = event.get("waiting", 0)
        for name in [name for name, count in waiting.items() if count]:
            self._say(name, type=QUEUE, waiting=0)
        for name, before in last.items():
            if (record := state.models.get(name)) is None:
                self._say(name, type="removed")
            elif record.state.value != before:
                found = _transition(None, record) | {"from": before}
                if isinstance(record.phase, Stopped) and not record.phase.reason:
                    found["reason"] = "found so after a restart"
                self._say(name, **found)

    def published(self, old: State, new: State) -> None:
        if old.workers is not new.workers:
            self._note_queues(old, new)
        if old.models is new.models:
            return
        for name, record in new.models.items():
            before = old.models.get(name)
            if before is None or before.state is not record.state:
                self._say(name, **_transition(before, record))
        for name in old.models.keys() - new.models.keys():
            self._say(name, type="removed")
            self._lengths.pop(name, None)

    def switched(self, switch: SwitchFinished) -> None:
        self._say(
            switch.model,
            type="switch",
            victims=list(switch.victims),
            cold=switch.cold,
            drain_secs=round(switch.drained_at - switch.decided_at, 4),
            park_secs=round(switch.room_at - switch.drained_at, 4),
            up_secs=round(switch.serving_at - switch.room_at, 4),
            duration_secs=round(switch.serving_at - switch.decided_at, 4),
        )

    def ordered(self, order: Order, what: str) -> None:
        """An operator's order was given, or ended; ``what`` says how."""
        facts = {"order": order.id, "verb": order.verb, "by": order.by, "result": what}
        for model in order.models or ("",):
            self._say(model, type="order", **facts)

    def answer(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """``after``: events with greater numbers, the oldest first, as many as fit into a message
        (``more``: there are others); without it the newest. ``queues``: lengths of queues too."""
        after, queues = args.get("after"), args.get("queues") is True
        events = [event for event in self.recent if queues or event["type"] != QUEUE]
        if after is None:
            return {"events": events[-TAIL_EVENTS:], "more": False}
        if isinstance(after, bool) or not isinstance(after, int):
            raise Refused(Reason.BAD_REQUEST, f'"after" must be a whole number, not {after!r}')
        wanted = [event for event in events if event["id"] > after]
        page = list(_that_fit(wanted))
        return {"events": page, "more": len(page) < len(wanted)}

    def _note_queues(self, old: State, new: State) -> None:
        now = time()
        for name in _demands_changed(old, new):
            noted, length = self._lengths.get(name, (0.0, 0))
            waiting = new.waiting(name)
            # The end of a wait is never held back: nothing may follow it for long.
            if waiting == length or (waiting and length and now - noted < QUEUE_SECS):
                continue
            self._lengths[name] = (now, waiting)
            self._say(name, type=QUEUE, waiting=waiting)

    def _say(self, model: str, **facts: Any) -> None:
        now = time()
        self._forget_old(now)
        event = {"id": next(self._number), "time": round(now, 3), "model": model} | facts
        self.recent.append(event)
        self._keep(event)
        self._watchers.publish("timeline", "", event)
        if event["type"] != QUEUE:
            self._watchers.publish("events", "", event)

    def _forget_old(self, now: float) -> None:
        while self.recent and self.recent[0]["time"] < now - KEEP_SECS:
            self.recent.popleft()

    def _keep(self, event: Event) -> None:
        if self._store is None:
            return
        try:
            self._store.append(event)
        except StateFileError as error:
            if not self._unwritten:
                log.warning("%s", error)
            self._unwritten = True
        else:
            self._unwritten = False


def _event(kept: Mapping[str, Any]) -> Event | None:
    """What is known of a kept event; None for one of another version or a damaged one, which must
    not disturb the events of today."""
    event = {key: kept[key] for key in _FIELDS if key in kept}
    whole = event.keys() >= _COMMON and all(fits(_FIELDS[key], event[key]) for key in event)
    return event if whole else None


def _that_fit(events: Iterable[Event]) -> Iterator[Event]:
    room = PAGE_BYTES
    for event in events:
        room -= len(json.dumps(event)) + 1
        if room < 0:
            return
        yield event


def _demands_changed(old: State, new: State) -> set[str]:
    changed: set[str] = set()
    for name in old.workers.keys() | new.workers.keys():
        before, after = old.workers.get(name), new.workers.get(name)
        if before is after:
            continue
        former = before.demands if before else {}
        present = after.demands if after else {}
        changed |= {
            model
            for model in former.keys() | present.keys()
            if former.get(model) is not present.get(model)
        }
    return changed & new.models.keys()


def _transition(before: ModelRecord | None, after: ModelRecord) -> dict[str, Any]:
    lasted = None if before is None else round(max(0.0, after.phase.since - before.phase.since), 4)
    return {
        "type": "transition",
        "from": None if before is None else before.state.value,
        "to": after.state.value,
        "reason": _reason(before, after),
        "gpus": list(after.gpus),
        "duration_secs": lasted,  # how long it was in the former state
    }


def _reason(before: ModelRecord | None, after: ModelRecord) -> str:
    match after.phase:
        case Starting(reason=reason):
            return reason or "wanted, and not parked"
        case Stopped(reason=reason) | Stopping(reason=reason):
            return reason or "asked"
        case Failed(message=message):
            return message
        case Draining(wanted_by=wanted_by) | Parking(wanted_by=wanted_by):
            return f"room for {wanted_by}" if wanted_by else "asked"
        case Parked(eviction=eviction) | Waking(eviction=eviction):
            return str(eviction)
        case Serving():
            return _up(before)


def _up(before: ModelRecord | None) -> str:
    match before.phase if before else None:
        case Starting():
            return "started"
        case Waking():
            return "woken and verified"
        case Draining():
            return "its room is not wanted any more"
        case _:
            return "adopted"
