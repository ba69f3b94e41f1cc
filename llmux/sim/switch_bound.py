"""What switches cost at least: a bound from below on the waits that counts them.

One GPU, one of two groups of models resident at a time: with more models, those of a group count as
one, between which switches cost nothing. Engines have places for all, and the future is known. A
dynamic program over the times of switches, on a grid on which what waits is rounded down:

- While a group is away, from the begin of one switch to the end of another, all that arrive wait.
- A request is answered in a stay that lasts long enough for it. So what came to the group, and
  would not have been answered by the begin of the switch, waits until the group comes back.
- The same for what came while the group was away, in the time that at least two switches took, and
  whose answer lasts longer than the stay.

A stay longer than ``STAY`` grid steps is taken for several, after each of which what waited at the
other group until then is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from llmux.sim.costs import Costs
from llmux.sim.trace import Arrival

PARTS = 8  # grid steps in the shorter switch
STEPS = 3000  # at most, of the whole trace
STAY = 150
NEVER = math.inf


@dataclass(slots=True)
class Group:
    """What came to it, by grid step: how many had ``arrived``, and the sum of their ``times``; how
    many were ``open``: an answer begun as they came would not have ended; the ``ages`` of these."""

    arrived: list[int]
    times: list[float]
    open: list[int]
    ages: list[list[int]]  # in whole steps
    came: list[list[float]]  # lengths of what arrived in the step that ends at k, in steps
    switch: int = 0  # steps at least from here to the other group

    def waits(self, begin: int, end: int, step: float) -> float:
        """Seconds that its requests wait between two grid steps in which it is not resident."""
        last = len(self.arrived) - 1
        first, until = min(begin, last), min(end, last)
        count = self.arrived[until] - self.arrived[first]
        later = count * end * step - (self.times[until] - self.times[first])
        return (end - begin) * step * self.open[first] + later

    def is_done(self, at: int) -> bool:
        at = min(at, len(self.arrived) - 1)
        return self.arrived[at] == self.arrived[-1] and not self.open[at]


def switching_bound(trace: Sequence[Arrival], costs: Costs) -> float:
    """No order of switches makes the sum of waits less than this."""
    sides = split(trace)
    if not all(sides):
        return 0.0
    names = [{one.model for one in side} for side in sides]
    parks = [min(costs.of(name).park for name in group) for group in names]
    comes = [
        min(min(costs.of(name).wake, costs.of(name).start) for name in group) for group in names
    ]
    switches = (parks[0] + comes[1], parks[1] + comes[0])
    horizon = max(one.at for one in trace)
    step = max(min(switches) / PARTS, horizon / STEPS, 0.25)
    end = math.ceil(horizon / step)
    groups = [group_of(side, step, end) for side in sides]
    for group, seconds in zip(groups, switches, strict=True):
        group.switch = math.floor(seconds / step) - 1
    if min(group.switch for group in groups) < 1:
        return 0.0  # the trace is too long for the grid
    return Program(groups, step, end).least()


def split(trace: Sequence[Arrival]) -> tuple[list[Arrival], list[Arrival]]:
    """Two groups of models with about as many requests."""
    by_model: dict[str, list[Arrival]] = {}
    for one in trace:
        by_model.setdefault(one.model, []).append(one)
    sides: tuple[list[Arrival], list[Arrival]] = ([], [])
    for arrivals in sorted(by_model.values(), key=len, reverse=True):
        min(sides, key=len).extend(arrivals)
    return sides


def group_of(side: Sequence[Arrival], step: float, end: int) -> Group:
    counts, times, change = [0] * (end + 1), [0.0] * (end + 1), [0] * (end + 2)
    ages: list[list[int]] = [[] for _ in range(end + 1)]
    came: list[list[float]] = [[] for _ in range(end + 1)]
    for one in side:
        first = math.ceil(one.at / step)  # the first step by which it has arrived
        counts[first] += 1
        times[first] += one.at
        came[first].append(one.service / step)
        until = min(math.ceil((one.at + one.service) / step), end + 1)
        for at in range(first, until):
            ages[at].append(at - first)
        if until > first:
            change[first] += 1
            change[until] -= 1
    return Group(
        list(accumulate(counts)), list(accumulate(times)), list(accumulate(change[:-1])), ages, came
    )


@dataclass(slots=True)
class Program:
    """``came[i][t]``: the least wait up to now when group i came up at t; ``stays[i][t]``: when it
    was there before, and what waits at the other is forgotten."""

    groups: Sequence[Group]
    step: float
    end: int
    came: list[list[float]] = field(init=False)
    stays: list[list[float]] = field(init=False)
    late: list[list[list[float]]] = field(init=False)  # see ``too_long``, by group and begin
    best: float = NEVER

    def __post_init__(self) -> None:
        self.came = [[NEVER] * (self.end + 1) for _ in self.groups]
        self.stays = [[NEVER] * (self.end + 1) for _ in self.groups]
        self.late = [[[] for _ in range(self.end + 1)] for _ in self.groups]

    def least(self) -> float:
        """Either group may be up at time 0: who knows the future has started it before."""
        self.stays[0][0] = self.stays[1][0] = 0.0
        for now in range(self.end + 1):
            for i in (0, 1):
                self.stay(i, now)
                self.leave(i, now)
        return self.best

    def stay(self, i: int, now: int) -> None:
        """To the end, or longer than ``STAY``."""
        own, other = self.groups[i], self.groups[1 - i]
        left = max(now - other.switch, 0)  # when the other did, if this one has just come up
        if self.came[i][now] < NEVER:
            self.late[i][now] = too_long(own, now, own.switch + other.switch, self.step)
            if now > STAY:
                self.late[i][now - STAY - 1] = []  # needed no more
            if other.is_done(left):
                self.best = min(self.best, self.came[i][now])
        if self.stays[i][now] < NEVER and other.is_done(now):
            self.best = min(self.best, self.stays[i][now])
        on = min(now + STAY, self.end)
        cost = min(
            self.came[i][now] + other.waits(left, on, self.step),
            self.stays[i][now] + other.waits(now, on, self.step),
        )
        if on == self.end:  # what waits after the last arrival is not counted
            self.best = min(self.best, cost)
        else:
            self.stays[i][on] = min(self.stays[i][on], cost)

    def leave(self, i: int, now: int) -> None:
        """After a stay of any length up to ``STAY``."""
        own, other = self.groups[i], self.groups[1 - i]
        arrives = now + own.switch
        cost = NEVER
        missed = 0.0  # waits in this stay of those that would be cut off now
        ages = sorted(own.ages[now], reverse=True)
        for length in range(min(STAY, now) + 1):
            if length:
                while ages and ages[-1] < length:
                    ages.pop()
                missed += len(ages) * self.step
            began = now - length
            if (known := self.came[i][began]) < NEVER:
                waited = other.waits(began - other.switch, arrives, self.step)
                cost = min(cost, known + missed + self.late[i][began][length] + waited)
            if (known := self.stays[i][began]) < NEVER:
                cost = min(cost, known + missed + other.waits(began, arrives, self.step))
        if arrives > self.end:
            self.best = min(self.best, cost)
        else:
            self.came[1 - i][arrives] = min(self.came[1 - i][arrives], cost)


def too_long(group: Group, at: int, away: int, step: float) -> list[float]:
    """By the length of a stay that began at ``at``: the waits of those that came in the ``away``
    steps before, and whose answers last longer than it, though they would have ended had they been
    begun as they came."""
    change = [0] * (STAY + 2)
    for came in range(max(0, at - away + 1), at + 1):
        for length in group.came[came]:
            first = math.ceil(came - at + length)
            if first <= STAY:
                change[max(first, 0)] += 1
                change[min(math.ceil(length), STAY + 1)] -= 1
    left = accumulate(change[: STAY + 1])
    return [count * (length + away) * step for length, count in enumerate(left)]
