"""What a policy sees and decides.

A policy is a pure function of what it is given: it neither logs nor counts, since it is asked
speculatively. It says which waiting model is considered first, which resident model leaves first
when room is needed, and from when on a resident may leave for a waiting one. That models fit, that
nothing moves at once on a GPU and that drains end are none of its business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmux.config.schema import PolicyConfig
from llmux.core.demand.usage import UNUSED, Usage

EULER = 0.5772  # the sum's distance from the logarithm


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model that requests wait for and that is not resident. Times on the reducer's clock."""

    model: str
    waiting: int  # requests; 0: only an operator
    oldest_since: float
    cost: float = 0.0  # seconds from room to serving, as measured, by how it is parked now
    usage: Usage = UNUSED  # arrivals and answers, lately
    places: int = 1024  # requests that its engine is given at a time
    priority: int = 0
    away_since: float = math.inf  # since when it is as it is now: parked, stopped or failed
    service: float = field(init=False)  # mean seconds of an answer
    drain: float = field(init=False)  # seconds to answer as many of its requests as have places
    turn: float = field(init=False)  # and all of them
    pace: float = field(init=False)  # answers for a second of its switch and turn

    def __post_init__(self) -> None:
        # Once, and not in each of the decisions in which nothing of it has changed.
        service = self.usage.service
        object.__setattr__(self, "service", service)
        object.__setattr__(self, "drain", drain_of(service, self.places, self.waiting))
        turn = turn_of(service, self.places, self.waiting)
        object.__setattr__(self, "turn", turn)
        object.__setattr__(self, "pace", self.waiting / max(self.cost + turn, 1e-9))


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


def turn_of(service: float, places: int, requests: float) -> float:
    """Seconds to answer so many requests at all places, to the last answer."""
    rest = drain_of(service, places, requests)
    return rest if requests <= places else service * (requests / places - 1) + rest


def drain_of(service: float, places: int, requests: float) -> float:
    """Seconds until the last of so many answers has ended, or of as many as have places."""
    return drained_in(service, requests if requests < places else places)


def drained_in(service: float, requests: float) -> float:
    """Mean of the longest of so many exponential times: service × (1 + 1/2 + … + 1/requests)."""
    sum_ = math.log(requests + 0.5) + EULER
    return service * sum_ if sum_ > 0.0 else 0.0


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
