"""Policies: who gets room first, and from when on a serving model may be sent away.

Pure functions over a view; they neither log nor count, since they are asked speculatively.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmux.config.schema import PolicyConfig, PolicyType


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model that is wanted and not resident. Times in seconds on the reducer's clock."""

    model: str
    waiting: int
    oldest_since: float
    cost: float = 0.0  # what making it resident took lately, draining aside


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that serves and could make room."""

    model: str
    serving_since: float
    in_flight: int
    last_active: float


class Policy(Protocol):
    def order(self, waiting: Sequence[Waiting]) -> Sequence[str]:
        """Who is considered first."""

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        """Who goes first when room is needed."""

    def earliest(self, target: Waiting, victim: Resident) -> float:
        """The time from which ``victim`` may be drained for ``target``."""


@dataclass(frozen=True, slots=True)
class Fifo:
    """Whoever has waited longest is next; a model serves at least ``min_active_secs``."""

    config: PolicyConfig

    def order(self, waiting: Sequence[Waiting]) -> Sequence[str]:
        return [w.model for w in sorted(waiting, key=lambda w: (w.oldest_since, w.model))]

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        # idle ones first, then the one that was used longest ago
        key = lambda r: (r.in_flight > 0, r.last_active, r.model)  # noqa: E731  # used once
        return [r.model for r in sorted(residents, key=key)]

    def earliest(self, target: Waiting, victim: Resident) -> float:
        return victim.serving_since + self.config.min_active_secs


class CostAware(Fifo):
    """Switches are paid for by requests: a model is sent away when enough wait for the other, when
    it has served at least as long as the switch takes and a little more has gathered, or when
    somebody has waited for too long."""

    def earliest(self, target: Waiting, victim: Resident) -> float:
        config = self.config
        enough = max(1, math.ceil(config.amortization_factor * target.cost))
        if target.waiting >= enough > 1 or config.amortization_factor == 0:
            worthwhile = target.oldest_since
        else:
            gathered = target.oldest_since + config.coalesce_window_ms / 1000
            worthwhile = max(victim.serving_since + target.cost, gathered)
        limit = target.oldest_since + config.max_wait_secs
        return max(Fifo.earliest(self, target, victim), min(worthwhile, limit))


class TimeSlice(Fifo):
    """Idle models go first, busy ones when somebody has waited for too long: steady traffic to one
    model delays the others, but for a bounded time."""

    def earliest(self, target: Waiting, victim: Resident) -> float:
        allowed = Fifo.earliest(self, target, victim)
        if not victim.in_flight:
            return allowed
        return max(allowed, target.oldest_since + self.config.max_wait_secs)


def policy_for(config: PolicyConfig) -> Policy:
    match config.policy_type:
        case PolicyType.FIFO:
            return Fifo(config)
        case PolicyType.COST_AWARE:
            return CostAware(config)
        case PolicyType.TIME_SLICE:
            return TimeSlice(config)
