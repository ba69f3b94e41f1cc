"""``cost_aware``: a switch has to be paid for by the requests that wait for it.

As ``fifo``, but a busy model also stays until enough requests wait for the other
(``amortization_factor`` of them for each second of switching), or until it has served as long as
the switch takes and ``coalesce_window_ms`` has let a little more gather; at most until the oldest
of them has waited ``max_wait_secs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmux.config.schema import PolicyConfig
from llmux.core.policies.base import Resident, Waiting, idle_first, oldest_first
from llmux.core.policies.fifo import Fifo


@dataclass(frozen=True, slots=True)
class CostAware:
    config: PolicyConfig

    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        return oldest_first(waiting)

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        return idle_first(residents)

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        config = self.config
        allowed = Fifo(config).earliest(target, victim, waiting, now)
        cost = target.cost + victim.leave
        enough = math.ceil(config.amortization_factor * cost)
        if target.waiting >= enough > 1 or config.amortization_factor == 0:
            worthwhile = target.oldest_since
        else:
            gathered = target.oldest_since + config.coalesce_window_ms / 1000
            worthwhile = max(victim.serving_since + cost, gathered)
        limit = target.oldest_since + config.max_wait_secs
        return max(allowed, min(worthwhile, limit))
