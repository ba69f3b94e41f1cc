"""Policies: who gets room first, and from when on a serving model may be sent away.

Pure functions over a view; they neither log nor count, since they are asked speculatively.
"""

from __future__ import annotations

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


def policy_for(config: PolicyConfig) -> Policy:
    match config.policy_type:
        case PolicyType.FIFO:
            return Fifo(config)
        case PolicyType.COST_AWARE | PolicyType.TIME_SLICE:
            # refused by the configuration check, which names the line
            raise NotImplementedError(config.policy_type)
