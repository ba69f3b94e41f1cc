"""``fair``: the default. Stay as long as leaving costs more waiting than it saves, and no longer.

1. An idle model leaves at once.
2. While requests queue here for a place at the engine, they are served first: an exhausted queue
   is what makes the most of a switch. For load that is not feasible this is bounded: by eight times
   what the switches to all models that wait take, their drains included.
3. Busy, with none queueing here: leave when staying open gains no more than it costs. The drain of
   n requests of mean length s takes s × (1 + 1/2 + … + 1/n) in any case. To stay open lets λ
   requests per second in, each of which delays its end by s/(n+1) for all that wait elsewhere or
   will come there until their turn, and is saved the time until the model is back, after the turns
   of all that wait: leave when (n+1) × away ≤ s × (waiting elsewhere).
4. At the latest when the oldest request elsewhere has waited ``max_wait_secs``, and not before half
   the model's own way out and back was served, and one and a half times what the drain would take
   now. Where all turns together last longer than ``max_wait_secs`` that is over before a model
   comes up, and one that left at once would be closed while its batch is answered.

Next comes, of the model that has been waited for longest and those that were not resident since its
first request came, the one that gives the most answers for the time of its switch and turn. So each
model is overtaken by each other one once at most.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from llmux.config.schema import PolicyConfig
from llmux.core.policies.base import Resident, Waiting, drained_in, idle_first, turn_of

TURN = 0.5  # of the way out and back: the least that a model serves before it is sent away
DRAINS = 1.5  # of the drain as it would be now: the least as well
OVERHEAD = 8.0  # seconds between switches for a second of switching, when queues never end
_OLDEST = attrgetter("oldest_since")
_LONGEST_WAITING = attrgetter("oldest_since", "model")
_PRIORITY = attrgetter("priority")


@dataclass(frozen=True, slots=True)
class Cycle:
    """What leaving now means. ``delayed``: requests that wait elsewhere when their turn comes;
    ``away``: seconds until the model is back; ``switching``: those of them that serve nothing but
    drains."""

    delayed: float
    away: float
    switching: float


@dataclass(frozen=True, slots=True)
class Fair:
    config: PolicyConfig

    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        left = sorted(waiting, key=_LONGEST_WAITING)
        left.sort(key=_PRIORITY, reverse=True)
        order: list[str] = []
        for _, ties in itertools.groupby(left, key=_PRIORITY):
            order += _rounds(list(ties))
        return order

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        return idle_first(residents)

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        oldest = min(one.oldest_since for one in waiting)
        if not victim.in_flight:  # 1
            return oldest
        drain = drained_in(victim.service, min(victim.in_flight, victim.places))
        cycle = cycle_of(victim, waiting, drain, now)
        if victim.queued:  # 2
            turn = OVERHEAD * cycle.switching
        else:  # 3
            if (victim.in_flight + 1) * cycle.away <= victim.service * cycle.delayed:
                return oldest
            turn = TURN * (victim.leave + victim.back) + DRAINS * drain
        return max(oldest + self.config.max_wait_secs, victim.serving_since + turn)


def _rounds(left: list[Waiting]) -> list[str]:
    """Models of one priority, the longest waiting in front, in the order in which they come. Each
    is weighed once, since hundreds may wait."""
    paces = [one.pace for one in left]
    best_first = sorted(range(len(left)), key=paces.__getitem__, reverse=True)
    if max(one.away_since for one in left) <= left[0].oldest_since:  # all may come now
        return [left[at].model for at in best_first]
    rank = [0] * len(left)  # of equals the longest waiting is first
    for place, at in enumerate(best_first):
        rank[at] = place
    by_absence = deque(sorted((one.away_since, at) for at, one in enumerate(left)))
    may_come: list[int] = []  # ranks, as a heap
    entered = [False] * len(left)
    came = [False] * len(left)
    order: list[str] = []

    def enter(at: int) -> None:
        if not entered[at]:
            entered[at] = True
            heapq.heappush(may_come, rank[at])

    for at, first in enumerate(left):
        while not came[at]:
            enter(at)
            while by_absence and by_absence[0][0] <= first.oldest_since:
                enter(by_absence.popleft()[1])
            if not by_absence:  # all may come now
                return order + [left[best_first[place]].model for place in sorted(may_come)]
            next_ = best_first[heapq.heappop(may_come)]
            came[next_] = True
            order.append(left[next_].model)
    return order


def cycle_of(victim: Resident, waiting: Sequence[Waiting], drain: float, now: float) -> Cycle:
    """As if they came in the order of their wait."""
    away, switching, delayed = drain, drain + victim.back, 0.0
    for one in sorted(waiting, key=_OLDEST):
        switch = one.cost + victim.leave
        away += switch
        if one.usage.rate > 0.0:
            batch = one.waiting + one.usage.rate_at(now) * away
            delayed += batch
            away += turn_of(one.service, one.places, batch)
        else:
            delayed += one.waiting
            away += one.turn
        switching += switch + one.drain
    return Cycle(delayed, away + victim.back, switching)
