"""Retry-After, from measured switch times and queue throughput.

Pure; the clock is handed in. Unknown values are guessed low: a client that comes back too early
gets a better number then, a client that was sent away for too long never learns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmux.protocol import ModelInfo

UNKNOWN_SWITCH_SECS = 10.0  # before the first switch was seen
RECENT = 512  # served requests that the rate is taken from; older ones fade

COMING_UP = {"starting": b"cold", "waking": b"woken"}  # state → its name in X-Llmux-Switch


class Throughput:
    """Throughput of one model's queue while it is non-empty, time parked included."""

    __slots__ = ("_count", "_former", "_last", "_since")

    def __init__(self) -> None:
        self._count = 0
        self._since = self._last = 0.0
        self._former: float | None = None  # seconds per request the last time it was non-empty

    def becomes_nonempty(self, now: float) -> None:
        if self._count:
            self._former = (self._last - self._since) / self._count
        self._since, self._count = now, 0

    def served(self, now: float, count: int) -> None:
        """``count`` requests left the head of the queue."""
        self._last = now
        self._count += count
        while self._count >= RECENT:
            self._count //= 2
            self._since = now - (now - self._since) / 2

    @property
    def measured(self) -> bool:
        """Whether a request was served since the queue became non-empty."""
        return self._count > 0

    def secs_each(self, now: float) -> float | None:
        if self._count == 0:
            return self._former
        return (now - self._since) / self._count


@dataclass(slots=True)
class _Seen:
    state: str
    since: float
    switch_secs: float | None


class Switches:
    """The models' states and switch times, as the catalog gives them."""

    def __init__(self, clock: Callable[[], float], *, min_active_secs: float) -> None:
        self._clock = clock
        self.min_active_secs = min_active_secs
        self._models: dict[str, _Seen] = {}
        self._coming: dict[str, bytes] = {}

    def see(self, infos: Iterable[ModelInfo]) -> None:
        now = self._clock()
        before, self._models = self._models, {}
        for info in infos:
            seen = before.get(info.name)
            since = seen.since if seen is not None and seen.state == info.state else now
            self._models[info.name] = _Seen(info.state, since, info.switch_secs)
            if info.state in COMING_UP:
                self._coming[info.name] = COMING_UP[info.state]

    def granted(self, model: str) -> bytes:
        """The value of X-Llmux-Switch for the requests that waited for the model."""
        return self._coming.pop(model, b"none")

    def secs_until(self, model: str, wanted: Iterable[str]) -> float:
        """Estimated seconds until the model serves.

        A model that is coming up: the rest of its own switch. Otherwise its switch after those of
        the ``wanted`` models, each with the time it then keeps the GPU.
        """
        seen = self._models.get(model)
        own = self._switch_secs(model)
        if seen is not None and seen.state in COMING_UP:
            return max(1.0, own - (self._clock() - seen.since))
        ahead = sum(
            self._switch_secs(other) + self.min_active_secs for other in wanted if other != model
        )
        return own + ahead

    def _switch_secs(self, model: str) -> float:
        seen = self._models.get(model)
        if seen is None or seen.switch_secs is None:
            known = [one.switch_secs for one in self._models.values() if one.switch_secs]
            return sum(known) / len(known) if known else UNKNOWN_SWITCH_SECS
        return seen.switch_secs
