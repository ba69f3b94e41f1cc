"""Limits of one key: concurrent requests, how many of them may wait, requests per minute.

Pure; the clock is handed in. Each of several workers enforces its share (limit / workers, rounded
up) and workers share nothing. All workers together therefore admit at most ``workers - 1`` more
than the limit, and a client whose connections all reach one worker gets only that worker's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from llmux.config.schema import Key
from llmux.errors import Reason, Refused


def share(limit: int, workers: int) -> int:
    return math.ceil(limit / workers)


class KeyUse:
    """One key's use in this worker. ``begin`` and ``wait`` raise Refused; each ``begin`` needs one
    ``end``, and each ``wait`` before it one ``served`` or an ``end(waited=True)``."""

    __slots__ = (
        "_burst", "_clock", "_filled_at", "_rate", "_tokens", "in_flight", "key", "models",
        "most", "most_waiting", "waiting",
    )  # fmt: skip

    def __init__(self, key: Key, workers: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rate: float | None = None
        self._tokens = 0.0
        self.in_flight = self.waiting = 0
        self.models = key.models
        self.set_limits(key, workers)

    def set_limits(self, key: Key, workers: int) -> None:
        """Apply the limits of a re-read key; running requests are not touched."""
        self.key = key
        self.most = None if key.max_in_flight is None else share(key.max_in_flight, workers)
        self.most_waiting = None if key.max_waiting is None else share(key.max_waiting, workers)
        per_minute, had_rate = key.requests_per_minute, self._rate is not None
        self._rate = None if per_minute is None else per_minute / workers / 60
        self._burst = 0.0 if per_minute is None else max(1.0, per_minute / workers)
        if had_rate:
            self._tokens = min(self._tokens, self._burst)
        else:  # all that was asked for before counts for nothing
            self._tokens, self._filled_at = self._burst, self._clock()

    def allow(self, names: Mapping[str, str]) -> None:
        """Resolve the key's list of models through ``names`` (name or alias → model)."""
        named = self.key.models
        self.models = None if named is None else frozenset(names.get(name, name) for name in named)

    def begin(self) -> None:
        if self.most is not None and self.in_flight >= self.most:
            raise Refused(
                Reason.RATE_LIMITED,
                f"this key is limited to {self.key.max_in_flight} concurrent requests",
            )
        if self._rate is not None:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            if self._tokens < 1:
                raise Refused(
                    Reason.RATE_LIMITED,
                    f"this key is limited to {self.key.requests_per_minute:g} requests per minute",
                    retry_after=(1 - self._tokens) / self._rate,
                )
            self._tokens -= 1
        self.in_flight += 1

    def wait(self) -> None:
        """A request that was begun must wait."""
        if self.most_waiting is not None and self.waiting >= self.most_waiting:
            raise Refused(
                Reason.RATE_LIMITED,
                f"this key is limited to {self.key.max_waiting} waiting requests",
            )
        self.waiting += 1

    def wait_again(self) -> None:
        """As ``wait``, without the limit: the engine died, not the client's fault."""
        self.waiting += 1

    def served(self) -> None:
        self.waiting -= 1

    def end(self, *, waited: bool = False) -> None:
        self.in_flight -= 1
        self.waiting -= waited
