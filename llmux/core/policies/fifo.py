"""``fifo``: the model that has been waited for longest is next.

A busy model serves at least ``min_active_secs``, and on while requests queue for a place at its
engine, until the switch costs no more than a ninth of its time: to leave earlier would only make
the queues grow. An idle model leaves at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmux.config.schema import PolicyConfig
from llmux.core.policies.base import Resident, Waiting, idle_first, oldest_first

WORTH = 8.0  # seconds of service for a second of switching


@dataclass(frozen=True, slots=True)
class Fifo:
    config: PolicyConfig

    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        return oldest_first(waiting)

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        return idle_first(residents)

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        if not victim.in_flight:
            return target.oldest_since
        least = self.config.min_active_secs
        if victim.queued:
            least = max(least, WORTH * (target.cost + victim.leave))
        return victim.serving_since + least
