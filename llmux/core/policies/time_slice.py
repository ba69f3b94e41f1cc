"""``time_slice``: idle models leave at once, busy ones when a request elsewhere has waited for
``max_wait_secs``: steady traffic to one model delays the others, but for a bounded time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmux.config.schema import PolicyConfig
from llmux.core.policies.base import Resident, Waiting, idle_first, oldest_first
from llmux.core.policies.fifo import Fifo


@dataclass(frozen=True, slots=True)
class TimeSlice:
    config: PolicyConfig

    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        return oldest_first(waiting)

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        return idle_first(residents)

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        allowed = Fifo(self.config).earliest(target, victim, waiting, now)
        if not victim.in_flight:
            return allowed
        return max(allowed, target.oldest_since + self.config.max_wait_secs)
