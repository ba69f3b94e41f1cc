"""Which of the requests that were in flight when an engine died killed it.

- All of them are suspects and are repeated, for most engines die of something else. A suspect that
  an engine outlives, to the first byte of its answer, is none any more.
- Suspects are tried in groups, one after the other. Nothing else is sent while one is on trial:
  what comes meanwhile waits, and goes when no suspect waits any more. Beside a group is only what
  has a first byte already, or has outlived its own trial.
- With a death the group on trial becomes up to eight smaller ones, which are tried next. What was
  beside it comes last, for it has outlived a trial; its next one lasts longer.
- To blame is only who was alone: nothing else was on the engine, begun answers included, when it
  died, and it had died with this request before. It alone is refused (502). The same goes for one
  that the same engine broke off twice and lived. (With several workers nobody knows who is alone:
  there it takes more deaths, and two that are tried at one time can be mistaken for each other.)
- So each death makes a group smaller, or names one, or takes company from the one it names next: k
  that kill among n take at most ``1 + k * (1 + log8(n))`` deaths (n rounded up to a power of
  eight), and k more for those that came at k different times. One that kills later than its trial
  lasts takes a few more: its trials become longer until it does not outlive them.

A client that sends what kills again and again takes innocents along once each time, and they are
tried without it. So it costs starts, and others time, but no answers: the supervisor starts the
engine at once while ``Demand.repeated`` is told, up to its own limit of deaths without one answer
in between (core/operations.py), for then the engine is bad, whatever it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import inf
from typing import Final, Generic

from llmux.gateway.admission.queue import Lease, ModelQueue, Stage, T

GROUPS: Final = 8
# One that saw more is refused, whichever did it: only where engines die at random, or of others'.
MAX_DEATHS: Final = 20
# How long the next group waits for one without a byte of an answer: twice the time after which
# engines died with it, within bounds. Longer after two deaths: not to be mistaken again. Without a
# bound after more: one that kills late is not mistaken for ever, and a long answer gets its time.
TRIAL_SECS: Final = {1: (2.0, 10.0), 2: (5.0, 60.0)}
LAST_TRIAL_SECS: Final = (5.0, inf)


def choose(queue: ModelQueue[T], room: int, now: float) -> list[T]:
    """The waiting tickets that go now, in order of arrival; sets the queue's trial."""
    if queue.trial or room <= 0:
        return []
    group = _next_group(queue)
    if not group:
        return list(islice(queue.waiting, room))
    if group[room:]:
        queue.groups.appendleft(group[room:])
    chosen = group[:room]
    queue.trial = set(chosen)
    least, most = TRIAL_SECS.get(max(ticket.deaths for ticket in chosen), LAST_TRIAL_SECS)
    longest = max(ticket.lived for ticket in chosen)
    queue.trial_ends = now + min(max(2 * longest, least), most)
    return sorted(chosen, key=lambda ticket: ticket.arrived)


def _next_group(queue: ModelQueue[T]) -> list[T]:
    """Empty: no suspect waits."""
    queue.groups.extendleft(reversed(list(_groups(queue.tried))))
    queue.groups.extend(_groups(queue.others))
    queue.tried, queue.others = [], []
    while queue.groups:
        # Some may have left meanwhile.
        if group := [one for one in queue.groups.popleft() if one.stage is Stage.WAITING]:
            return group
    return []


def _groups(tickets: list[T]) -> Iterator[list[T]]:
    # What lived shortest is most likely the one; the others are then not harmed by it again.
    ordered = sorted(tickets, key=lambda ticket: ticket.lived)
    size = -(-len(ordered) // GROUPS)
    for start in range(0, len(ordered), max(size, 1)):
        yield ordered[start : start + size]


def put_back(ticket: T, queue: ModelQueue[T], was_tried: bool) -> None:
    """The ticket waits again; a suspect is tried again."""
    if ticket.deaths:
        (queue.tried if was_tried else queue.others).append(ticket)


def count_completed(queue: ModelQueue[T]) -> None:
    queue.completed += 1
    _calm(queue)


def _calm(queue: ModelQueue[T]) -> None:
    """Whatever died before is of the past, unless what killed it is still sought."""
    if not (queue.trial or queue.groups or queue.tried or queue.others):
        queue.repeated = 0


class Deaths(Generic[T]):
    """What the deaths of engines say. ``alone``: how often a ticket must have been alone to be the
    one: more than once where other workers have requests, too."""

    def __init__(self, alone: int) -> None:
        self._alone = alone

    def saw(self, ticket: T, lease: Lease[T], now: float) -> bool:
        """The engine died with this ticket in flight. Returns whether it may be repeated."""
        queue, lived = lease.queue, now - ticket.admitted_at
        if lease.died_with is None:
            lease.died_with = len(lease.in_flight)
            _calm(queue)  # amid answers that had begun it is no search
        if not ticket.repeatable:
            return False
        queue.repeated = lease.died_with
        again = ticket.deaths > 0 and ticket.broken_on is lease
        if not ticket.deaths:
            ticket.alone, ticket.lived = 0, lived
        ticket.deaths += 1
        is_alone = lease.died_with == 1
        ticket.alone += is_alone
        ticket.lived = max(lived, ticket.lived)
        ticket.broken_on = lease
        named = is_alone and ticket.deaths > self._alone <= ticket.alone
        return not named and not again and ticket.deaths <= MAX_DEATHS
