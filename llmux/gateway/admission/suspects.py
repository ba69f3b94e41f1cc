"""Which of the requests that were in flight when an engine died may have killed it.

All of them are repeated, for most engines die of something else: in up to eight groups, one at a
time and each beside whatever is new. A death then leaves one group; its members go in groups again.
What kills its engine alone is found, and it alone is refused: after two deaths among eight
requests, three among 64, four among 512.
"""

from __future__ import annotations

from itertools import islice
from typing import Final, Generic

from llmux.gateway.admission.queue import Lease, ModelQueue, T

GROUPS: Final = 8
MAX_DEATHS: Final = 5  # one that saw more is refused, whichever did it
# How long the next group waits for one without a byte of an answer: twice the time after which the
# engine died with it, within bounds. Longer after two deaths: not to be mistaken again.
SHORT_TRIAL_SECS: Final = (2.0, 10.0)
LONG_TRIAL_SECS: Final = (5.0, 60.0)


def choose(queue: ModelQueue[T], room: int, now: float) -> list[T]:
    """The waiting tickets that go now, in order of arrival; sets the queue's trial."""
    if not queue.suspected:
        return list(islice(queue.waiting, max(0, room)))
    top = max((ticket.deaths for ticket in queue.waiting), default=0)
    queue.suspected = top > 0
    suspects = [ticket for ticket in queue.waiting if ticket.deaths == top > 0]
    chosen: set[T] = set()
    if suspects and not queue.trial and room > 0:
        queue.group = queue.group or -(-len(suspects) // GROUPS)
        # What lived shortest is most likely the one; the others are then not harmed by it again.
        suspects.sort(key=lambda ticket: ticket.lived)
        chosen = set(suspects[: min(queue.group, room)])
        queue.trial = set(chosen)
        least, most = SHORT_TRIAL_SECS if top == 1 else LONG_TRIAL_SECS
        longest = max(ticket.lived for ticket in chosen)
        queue.trial_ends = now + min(max(2 * longest, least), most)
    others = (ticket for ticket in queue.waiting if ticket.deaths < max(top, 1))
    chosen.update(islice(others, max(0, room - len(chosen))))
    return [ticket for ticket in queue.waiting if ticket in chosen]


class Deaths(Generic[T]):
    """What the deaths of one engine say. ``alone``: how often a ticket must have been on trial
    alone to be the one: more than once where other workers have requests, too."""

    def __init__(self, alone: int) -> None:
        self._needed = alone + 1

    def saw(self, ticket: T, lease: Lease[T], now: float) -> bool:
        """The engine died with this ticket in flight. Returns whether it may be repeated."""
        queue = lease.queue
        if lease.suspects is None:
            lease.suspects = frozenset(queue.trial & lease.in_flight)
        ticket.lived = now - ticket.admitted_at
        if lease.culprit is not None:
            return True
        if lease.suspects and ticket.deaths and ticket not in lease.suspects:
            return True  # it has outlived a trial of its own
        ticket.deaths += 1
        lease.counted.add(ticket)
        queue.suspected, queue.group = True, 0
        if lease.suspects == {ticket} and ticket.deaths >= self._needed:
            lease.culprit = ticket
            for other in lease.counted - {ticket}:
                other.deaths -= 1
            return False
        return ticket.deaths <= MAX_DEATHS
