"""How much one key may use: requests at a time, how many of them may wait, and requests a minute.
Pure; the clock is handed in.

With several workers each keeps its part (limit / workers, rounded up) and nothing is shared between
them. So all workers together admit at most ``workers - 1`` more than the limit, and a client whose
connections all land on one worker gets only that worker's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from llmux.config.schema import Key
from llmux.errors import Reason, Refused


def share(limit: int, workers: int) -> int:
    return math.ceil(limit / workers)


class KeyUse:
    """What one key uses in this worker. ``begin`` and ``wait`` raise Refused; each begin has one
    ``end``, and each wait before it one ``served``, or the end says that it ``waited``."""

    __slots__ = (
        "_burst", "_clock", "_filled_at", "_rate", "_tokens", "in_flight", "key", "models",
        "most", "most_waiting", "waiting",
    )  # fmt: skip

    def __init__(self, key: Key, workers: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = self._burst = 0.0
        self._filled_at = clock()
        self.in_flight = self.waiting = 0
        self.models = key.models
        self.set_limits(key, workers)
        self._tokens = self._burst

    def set_limits(self, key: Key, workers: int) -> None:
        """The key's limits may change while requests run; what runs is not touched."""
        self.key = key
        self.most = None if key.max_in_flight is None else share(key.max_in_flight, workers)
        self.most_waiting = None if key.max_waiting is None else share(key.max_waiting, workers)
        a_minute = key.requests_per_minute
        self._rate = None if a_minute is None else a_minute / workers / 60
        self._burst = 0.0 if a_minute is None else max(1.0, a_minute / workers)
        self._tokens = min(self._tokens, self._burst)

    def allow(self, names: Mapping[str, str]) -> None:
        """The models that the key may use, by their own names; None: all."""
        named = self.key.models
        self.models = None if named is None else frozenset(names.get(name, name) for name in named)

    def begin(self) -> None:
        if self.most is not None and self.in_flight >= self.most:
            raise Refused(
                Reason.RATE_LIMITED,
                f"this key may have {self.key.max_in_flight} requests at a time",
            )
        if self._rate is not None:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            if self._tokens < 1:
                raise Refused(
                    Reason.RATE_LIMITED,
                    f"this key may make {self.key.requests_per_minute:g} requests a minute",
                    retry_after=(1 - self._tokens) / self._rate,
                )
            self._tokens -= 1
        self.in_flight += 1

    def wait(self) -> None:
        """The request that was begun has to wait."""
        if self.most_waiting is not None and self.waiting >= self.most_waiting:
            raise Refused(
                Reason.RATE_LIMITED,
                f"this key may have {self.key.max_waiting} requests wait at a time",
            )
        self.waiting += 1

    def wait_again(self) -> None:
        """Through no fault of its own: the engine died."""
        self.waiting += 1

    def served(self) -> None:
        self.waiting -= 1

    def end(self, *, waited: bool = False) -> None:
        self.in_flight -= 1
        self.waiting -= waited
