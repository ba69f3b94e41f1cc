"""Who watches what: events and engines' lines to the peers of the control socket that asked.

Nothing is kept for a peer: one that reads too slowly is dropped by the hub, and one that came late
finds the last events by the verb ``events``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Hashable
from time import time
from typing import Any, Final

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
from llmux.protocol import Collected, News, Watch

KEEP_EVENTS: Final = 256
COLLECT_SECS: Final = 0.5

Send = Callable[[News], None]


class Feeds:
    """The peers by what they watch, and the answers of workers that were asked for metrics."""

    def __init__(self) -> None:
        self._watchers: dict[tuple[str, str], dict[Hashable, Send]] = {}
        self._ids = itertools.count(1)
        self._expected: dict[int, tuple[set[str], dict[str, Any], asyncio.Event]] = {}

    def watch(self, peer: Hashable, message: Watch, send: Send) -> None:
        topic = (message.topic, message.model)
        if message.on:
            self._watchers.setdefault(topic, {})[peer] = send
        elif topic in self._watchers:
            self._watchers[topic].pop(peer, None)

    def left(self, peer: Hashable) -> None:
        for peers in self._watchers.values():
            peers.pop(peer, None)

    def publish(self, topic: str, model: str, item: Any) -> None:
        peers = self._watchers.get((topic, model))
        if peers:
            news = News(topic, model, item)
            for send in list(peers.values()):
                send(news)

    def line(self, model: str, text: str) -> None:
        """One line of an engine's output."""
        self.publish("logs", model, text)

    # ---- metrics of workers ---------------------------------------------------------------------

    async def collect(self, workers: list[str], ask: Callable[[str, int], None]) -> dict[str, Any]:
        """Worker → snapshot, of those that answered in time."""
        if not workers:
            return {}
        number = next(self._ids)
        answers: dict[str, Any] = {}
        complete = asyncio.Event()
        self._expected[number] = (set(workers), answers, complete)
        try:
            for worker in workers:
                ask(worker, number)
            async with asyncio.timeout(COLLECT_SECS):
                await complete.wait()
        except TimeoutError:
            pass
        finally:
            del self._expected[number]
        return answers

    def collected(self, worker: str, message: Collected) -> None:
        if message.id in self._expected:
            missing, answers, complete = self._expected[message.id]
            answers[worker] = message.snapshot
            missing.discard(worker)
            if not missing:
                complete.set()


class EventFeed:
    """A listener of the loop: every transition and every switch, as one object each."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self._number = itertools.count(1)
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEEP_EVENTS)

    def published(self, old: State, new: State) -> None:
        if old.models is new.models:
            return
        for name, record in new.models.items():
            before = old.models.get(name)
            if before is None or before.state is not record.state:
                self._say(name, **_transition(before, record))
        for name in old.models.keys() - new.models.keys():
            self._say(name, type="removed")

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

    def _say(self, model: str, **facts: Any) -> None:
        event = {"id": next(self._number), "time": round(time(), 3), "model": model} | facts
        self.recent.append(event)
        self._feeds.publish("events", "", event)


def _transition(before: ModelRecord | None, after: ModelRecord) -> dict[str, Any]:
    lasted = None if before is None else round(max(0.0, after.phase.since - before.phase.since), 4)
    return {
        "type": "transition",
        "from": None if before is None else before.state.value,
        "to": after.state.value,
        "reason": _reason(before, after),
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
