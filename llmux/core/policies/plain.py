"""``plain``: the simplest rule that does not collapse; the bench's measure for ``fair``.

Requests that wait here come first. Idle: leave at once. Busy with none waiting here: leave when the
oldest request elsewhere has waited ``max_wait_secs``, or the switch's cost if that is more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmux.config.schema import PolicyConfig
from llmux.core.policies.base import Resident, Waiting, idle_first, oldest_first


@dataclass(frozen=True, slots=True)
class Plain:
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
        if victim.queued:
            return math.inf
        return target.oldest_since + max(self.config.max_wait_secs, target.cost + victim.leave)
