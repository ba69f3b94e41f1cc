"""Sends events and engines' lines to the peers of the control socket that watch them.

Nothing is kept for a peer: one that reads too slowly is disconnected, and one that came late
gets the last events by the verb ``events`` (``event_log``).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Hashable
from typing import Any, Final

from llmux.protocol import Collected, News, Watch

COLLECT_SECS: Final = 0.5
TOPICS: Final = frozenset({"events", "timeline", "logs"})
MAX_TOPICS: Final = 1000  # watched by one peer; a gateway watches each model at most once

Send = Callable[[News], None]


class Watchers:
    """The peers by what they watch, and the answers of workers that were asked for metrics."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, str], dict[Hashable, Send]] = {}
        self._ids = itertools.count(1)
        self._expected: dict[int, tuple[set[str], dict[str, Any], asyncio.Event]] = {}

    def watch(self, peer: Hashable, message: Watch, send: Send) -> None:
        topic = (message.topic, message.model)
        if not message.on:
            self._unwatch(topic, peer)
        elif message.topic in TOPICS and sum(peer in p for p in self._peers.values()) < MAX_TOPICS:
            self._peers.setdefault(topic, {})[peer] = send

    def left(self, peer: Hashable) -> None:
        for topic in list(self._peers):
            self._unwatch(topic, peer)

    def _unwatch(self, topic: tuple[str, str], peer: Hashable) -> None:
        peers = self._peers.get(topic, {})
        peers.pop(peer, None)
        if not peers:
            self._peers.pop(topic, None)

    def publish(self, topic: str, model: str, item: Any) -> None:
        peers = self._peers.get((topic, model))
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
