"""What a place on a GPU costs: the models that would leave, the place that others would lose, and
whether an engine that is parked where there is no room is worth a cold start elsewhere.

Pure functions of values, as the policies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

from llmux.core.records import ROUNDING

IN_USE_SECS = 600.0  # a model that nobody asked for in so long needs no place kept free


def worth_of(rate: float, back: float) -> float:
    """Seconds of switching in a second that a model's absence is expected to cost: what was asked
    for often or lately is asked for again."""
    return rate * back


class Absent:
    """Models in use that are away: (share of a GPU, worth). What of them has a place on a GPU."""

    def __init__(self, models: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(models)
        self._shares = [share for share, _ in ordered]
        self._sums = list(accumulate((worth for _, worth in ordered), initial=0.0))

    def displaced(self, free: float, taken: float, own: float) -> float:
        """The worth of those that would fit into ``free``, and no longer once ``taken`` is gone.
        ``own``: the worth of the one that takes it, when it is among them."""
        most, least = free + ROUNDING, free - taken + ROUNDING
        sums = self._sums
        lost = sums[bisect_right(self._shares, most)] - sums[bisect_right(self._shares, least)]
        counted = own if least < taken <= most else 0.0
        return max(0.0, round(lost - counted, 9))
