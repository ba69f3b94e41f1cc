"""What a policy sees and decides.

A policy is a pure function of what it is given: it neither logs nor counts, since it is asked
speculatively. It says which waiting model is considered first, which resident model leaves first
when room is needed, and from when on a resident may leave for a waiting one. That models fit, that
nothing moves at once on a GPU and that drains end are none of its business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmux.config.schema import PolicyConfig


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model that requests wait for and that is not resident. Times on the reducer's clock."""

    model: str
    waiting: int  # requests; 0: only an operator
    oldest_since: float
    cost: float = 0.0  # seconds from room to serving, as measured, by how it is parked now
    rate: float = 0.0  # arrivals per second, lately
    service: float = 1.0  # mean seconds of an answer, lately
    places: int = 1024  # requests that its engine is given at a time
    priority: int = 0
    away_since: float = math.inf  # since when it is as it is now: parked, stopped or failed


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that serves and could make room."""

    model: str
    serving_since: float
    in_flight: int  # those that wait for a place at its engine included
    last_active: float
    leave: float = 0.0  # seconds to park it, as measured
    back: float = 0.0  # seconds to bring it back from there
    rate: float = 0.0
    service: float = 1.0
    places: int = 1024
    priority: int = 0

    @property
    def queued(self) -> int:
        """Requests that wait here, for a place at the engine."""
        return max(0, self.in_flight - self.places)


class Policy(Protocol):
    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        """The waiting models, the one to be considered first in front."""

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        """The resident models, the one to leave first in front."""

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        """The time from which ``victim`` may be drained for ``target``; ``waiting``: all models
        that wait for its GPUs."""


PolicyOf = Callable[[PolicyConfig], Policy]


def oldest_first(waiting: Sequence[Waiting]) -> list[str]:
    return [w.model for w in sorted(waiting, key=lambda w: (-w.priority, w.oldest_since, w.model))]


def idle_first(residents: Sequence[Resident]) -> list[str]:
    """Lowest priority first, then idle ones, then those used longest ago."""
    key = lambda r: (r.priority, r.in_flight > 0, r.last_active, r.model)  # noqa: E731  # once
    return [r.model for r in sorted(residents, key=key)]
