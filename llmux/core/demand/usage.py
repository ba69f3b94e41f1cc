"""Measured use of one model: arrivals, answers' length, operations' cost. Pure and small.

Averages forget exponentially, so that they follow what changes within minutes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

RATE_SECS = 120.0  # what arrived longer ago counts for less than a third
WORK_SECS = 600.0
UNKNOWN_COST_SECS = 10.0  # before the first measurement
COST_WEIGHT = 0.3  # of the newest sample
OUTLIER = 3.0  # a sample counts as at most so many times what is known, and at least its part


@dataclass(frozen=True, slots=True)
class Usage:
    """``rate``: arrivals per second as of ``at``. ``work`` and ``done``: seconds of requests in
    service and requests that ended, both forgotten alike, so that their quotient is the mean."""

    at: float = 0.0
    rate: float = 0.0
    work: float = 1.0
    done: float = 1.0
    in_flight: int = 0

    def rate_at(self, now: float) -> float:
        return self.rate * math.exp((self.at - now) / RATE_SECS) if self.rate else 0.0

    @property
    def service(self) -> float:
        """Mean seconds of an answer."""
        return self.work / self.done

    def after(
        self, now: float, *, arrived: int, completed: int, in_flight: int, places: int
    ) -> Usage:
        """``arrived`` and ``completed`` since the last call; ``in_flight`` from now on."""
        passed = max(0.0, now - self.at)
        kept = math.exp(-passed / WORK_SECS)
        return Usage(
            now,
            self.rate * math.exp(-passed / RATE_SECS) + arrived / RATE_SECS,
            self.work * kept + min(self.in_flight, places) * passed,
            max(1e-9, self.done * kept + completed),
            in_flight,
        )


UNUSED = Usage()


def averaged(known: float | None, seconds: float) -> float:
    """The moving average of a cost. One strange sample (a disk that hung) does not spoil it."""
    if known is None:
        return seconds
    sample = min(max(seconds, known / OUTLIER), known * OUTLIER)
    return known + COST_WEIGHT * (sample - known)


class Costs:
    """A working copy of what operations take, by (model, operation)."""

    def __init__(self, known: Mapping[tuple[str, str], float]) -> None:
        self.known = dict(known)
        self._means: dict[str, float] = {}

    def learn(self, name: str, operation: str, seconds: float) -> None:
        self.known[name, operation] = averaged(self.known.get((name, operation)), seconds)
        self._means.pop(operation, None)

    def of(self, name: str, operation: str) -> float:
        """Seconds that the operation takes with the model: measured, else those of other models,
        else a guess."""
        if (known := self.known.get((name, operation))) is not None:
            return known
        if operation not in self._means:
            found = [seconds for (_, other), seconds in self.known.items() if other == operation]
            self._means[operation] = sum(found) / len(found) if found else UNKNOWN_COST_SECS
        return self._means[operation]
