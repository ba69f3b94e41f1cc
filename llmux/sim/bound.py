"""What no policy can beat: the least mean wait for a trace, by one that knows it beforehand.

For one GPU on which one model is resident at a time. Exact for few requests (all orders of service
starts, with branches cut that cannot become better); for more the better of two relaxations:
switches cost nothing and one server works as fast as all places together, on what is shortest
first; or switches cost what they do and there are places for all (``switch_bound``).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmux.sim.costs import Costs
from llmux.sim.switch_bound import switching_bound
from llmux.sim.trace import Arrival

EXACT_UP_TO = 9  # requests


@dataclass(frozen=True, slots=True)
class Bound:
    mean_wait: float
    exact: bool


def lower_bound(trace: Sequence[Arrival], costs: Costs, places: int) -> Bound:
    if not trace:
        return Bound(0.0, True)
    if len(trace) <= EXACT_UP_TO:
        return Bound(_exact(sorted(trace), costs, places) / len(trace), True)
    return Bound(max(_relaxed(trace, places), switching_bound(trace, costs)) / len(trace), False)


def _exact(trace: Sequence[Arrival], costs: Costs, places: int) -> float:
    """The least sum of waits. The first model is up at time 0 if that helps: a clairvoyant has
    started it before."""
    best = float("inf")

    def switch(old: str, new: str) -> float:
        return costs.of(old).park + costs.of(new).wake

    def search(
        left: Sequence[int], now: float, resident: str, ends: list[float], sum_: float
    ) -> None:
        nonlocal best
        # what has arrived waits at least until now
        if sum_ + sum(max(0.0, now - trace[i].at) for i in left) >= best:
            return
        if not left:
            best = sum_
            return
        tried: set[str] = set()
        for index in left:
            one = trace[index]
            busy = sorted(ends)
            if one.model == resident or not resident:
                free = busy[-places] if len(busy) >= places else 0.0
                start = max(now, one.at, free)
            else:
                drained = max(busy, default=0.0)
                start = max(drained + switch(resident, one.model), one.at, now)
            key = f"{one.model}/{one.at}/{one.service}"
            if key in tried:  # alike: either comes first
                continue
            tried.add(key)
            kept = [*(ends if one.model == resident else []), start + one.service]
            rest = [i for i in left if i != index]
            search(rest, start, one.model, kept, sum_ + start - one.at)

    search(range(len(trace)), 0.0, "", [], 0.0)
    return best


def _relaxed(trace: Sequence[Arrival], places: int) -> float:
    """Least sum of completion times on one server of ``places`` times the speed, preempted for
    what has the least work left, less each request's own service; at least 0."""
    pending = sorted(trace)
    left: list[float] = []
    now = total = 0.0
    index = 0
    while left or index < len(pending):
        if not left:
            now = max(now, pending[index].at)
        while index < len(pending) and pending[index].at <= now:
            heapq.heappush(left, pending[index].service / places)
            index += 1
        until = pending[index].at if index < len(pending) else float("inf")
        work = heapq.heappop(left)
        if now + work <= until:
            now += work
            total += now
        else:
            heapq.heappush(left, work - (until - now))
            now = until
    own = sum(one.at + one.service for one in trace)
    return max(0.0, total - own)


def ratio(mean: float, bound: Bound) -> float | None:
    """How many times the bound; None where the bound is 0."""
    return round(mean / bound.mean_wait, 3) if bound.mean_wait else None


def describe(mean: float, bound: Bound) -> Mapping[str, object]:
    return {
        "mean_wait_s": round(bound.mean_wait, 3),
        "exact": bound.exact,
        "ratio": ratio(mean, bound),
    }
