"""Admission: which requests go to an engine now and which wait. One worker's state per model.

Pure bookkeeping: no I/O, no asyncio, the clock is handed in. ``llmux.gateway.dispatch`` calls the
one instance from the event loop only and acts on the returned values.

Invariants, tested by tests/properties/test_admission.py:

- a ticket is NEW, WAITING, IN_FLIGHT or ENDED; every list returned here moves its tickets first, so
  no ticket is handed out twice for one move and every waiting ticket is answered exactly once;
- a ticket in flight is counted on exactly one lease from before its request is written until its
  last byte, its failure or its client's disconnect;
- nothing is admitted on a revoked lease, or beyond the limit of requests in flight on one lease;
- no ticket waits while a usable lease with room is held, and no ticket overtakes a waiting one, but
  while what may have killed an engine is tried (``suspects``);
- ``grant`` itself counts the waiting tickets as in flight: a revoke read after it waits for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Generic

from llmux.errors import Reason, Refused
from llmux.gateway.admission.queue import ENDED, IN_FLIGHT, Lease, ModelQueue, Stage, T
from llmux.gateway.admission.suspects import Deaths, choose, count_completed, put_back
from llmux.protocol import Address, Demand

# How long an engine that refused a connection is left alone when the supervisor says nothing about
# it (it may be away). Then the grant is tried once more; a second failure is the client's answer.
SUSPECT_SECS = 1.0


class Admission(Generic[T]):
    """See the module. ``alone``: see ``Deaths``. The callbacks: ``on_change(model)`` when its
    demand changed, ``on_idle(lease)`` when a revoked lease has nothing in flight any more,
    ``on_room(tickets)`` with the tickets that got the places that became free."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        max_waiting: int,
        wait_secs: float,
        max_in_flight: int = sys.maxsize,
        alone: int = 1,
        models: Iterable[str] = (),
        on_change: Callable[[str], None] = lambda _model: None,
        on_idle: Callable[[Lease[T]], None] = lambda _lease: None,
        on_room: Callable[[list[T]], None] = lambda _tickets: None,
    ) -> None:
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self.wait_secs = wait_secs
        self._on_change = on_change
        self.on_idle = on_idle
        self.on_room = on_room
        self._queues: dict[str, ModelQueue[T]] = {}
        self._known: frozenset[str] = frozenset(models)
        self._closed = False
        self._deaths: Deaths[T] = Deaths(alone)
        self._wake_at: float | None = None  # never later than the first deadline

    # ---- requests -------------------------------------------------------------------------------

    def submit(self, ticket: T) -> Lease[T] | None:
        """The lease the ticket is now in flight on, or None when it waits. Raises Refused."""
        queue = self._queues.get(ticket.model)
        lease, most = None if queue is None else queue.lease, self._max_in_flight
        if lease is None or not lease.open or len(lease.in_flight) >= most:
            self._enqueue(ticket, queue)
            return None
        self._admit(ticket, lease, self._clock())
        self._on_change(ticket.model)
        return lease

    def _enqueue(self, ticket: T, queue: ModelQueue[T] | None) -> None:
        if ticket.model not in self._known:
            raise Refused(
                Reason.UNKNOWN_MODEL,
                f'the model "{ticket.model[:200]}" does not exist',
                hint="GET /v1/models lists the models",
                param="model",
            )
        if self._closed:
            raise Refused(
                Reason.SHUTTING_DOWN,
                f'cannot wait for model "{ticket.model}": the gateway is shutting down',
            )
        queue = queue or self._queue(ticket.model)
        if len(queue.waiting) >= self._max_waiting and queue.usable:
            raise Refused(
                Reason.OVERLOADED,
                f'cannot accept a request for model "{ticket.model}": {queue.in_flight} are in'
                f" flight and {len(queue.waiting)} are waiting",
                hint="try again later",
            )
        if len(queue.waiting) >= self._max_waiting:
            raise Refused(
                Reason.QUEUE_FULL,
                f'cannot wait for model "{ticket.model}": {len(queue.waiting)} requests are waiting'
                " for it",
                hint="try again later, or raise gateway.max_waiting",
            )
        self._wait(ticket, queue)

    def _wait(self, ticket: T, queue: ModelQueue[T]) -> None:
        if not queue.waiting:
            queue.throughput.becomes_nonempty(self._clock())
        ticket.stage = Stage.WAITING
        queue.waiting[ticket] = None
        if self._wake_at is None or ticket.deadline < self._wake_at:
            self._wake_at = ticket.deadline
        self._on_change(queue.model)

    @staticmethod
    def _admit(ticket: T, lease: Lease[T], now: float) -> None:
        ticket.admitted_at = now
        ticket.stage = IN_FLIGHT
        ticket.lease = lease
        lease.in_flight.add(ticket)
        lease.queue.in_flight += 1

    def leave(self, ticket: T, *, completed: bool = False) -> None:
        """End the ticket. Does nothing when it had ended already."""
        if ticket.stage is IN_FLIGHT:
            queue = self._release(ticket)
            if completed:
                count_completed(queue)
            if queue.waiting and queue.usable:  # maybe on another lease: they waited for a trial
                self.on_room(self.admit_waiting(queue.model))
        elif ticket.stage is Stage.WAITING:
            del self._queues[ticket.model].waiting[ticket]
        else:
            ticket.stage = ENDED
            return
        ticket.stage = ENDED
        self._on_change(ticket.model)

    def _release(self, ticket: T) -> ModelQueue[T]:
        lease: Lease[T] | None = ticket.lease
        assert lease is not None, "a ticket in flight has a lease"
        lease.in_flight.remove(ticket)
        queue = lease.queue
        queue.in_flight -= 1
        queue.trial.discard(ticket)
        if lease.revoked and not lease.in_flight:
            self.on_idle(lease)
        return queue

    def answered(self, ticket: T) -> None:
        """Its first byte has come: the engine outlived it."""
        ticket.repeatable = False
        if not ticket.deaths or ticket.lease is None:
            return
        ticket.deaths = 0
        queue = ticket.lease.queue
        queue.trial.discard(ticket)
        if queue.waiting and not queue.trial:
            self.on_room(self.admit_waiting(queue.model))

    def wait_again(self, ticket: T, *, begun: bool = True) -> bool:
        """Return a ticket in flight to its place in the queue, before its first byte: after its
        engine died, unless it is what kills engines; once a lease when it was not even ``begun``.

        Restarts the deadline: the request may now be waiting for a cold start. After True the
        caller must call ``admit_waiting``: a newer lease may be held already.
        """
        lease: Lease[T] | None = ticket.lease
        if lease is None or ticket.stage is not IN_FLIGHT:
            return False
        if begun:
            may = self._deaths.saw(ticket, lease, self._clock())
        else:
            may, ticket.unreached = ticket.unreached is not lease, lease
        if self._closed or not may or not ticket.repeatable:
            return False
        was_tried = ticket in lease.queue.trial
        queue = self._release(ticket)
        ticket.lease = None
        ticket.deadline = min(self._clock() + self.wait_secs, ticket.limit)
        later = queue.waiting
        self._wait(ticket, queue)
        put_back(ticket, queue, was_tried)
        if len(later) > 1:
            queue.waiting = dict.fromkeys(sorted(later, key=lambda waiter: waiter.arrived))
        return True

    # ---- messages of the supervisor -------------------------------------------------------------

    def set_models(self, models: Iterable[str]) -> None:
        """The supervisor refuses requests waiting for a removed model; we do not."""
        self._known = frozenset(models)

    def grant(self, model: str, epoch: str, address: Address) -> list[T]:
        """All waiting tickets, now in flight on the lease of ``epoch`` (``held(model)``).

        A restarted supervisor grants the same epoch again: the lease goes on.
        """
        queue = self._queue(model)
        lease = queue.leases.get(epoch)
        if lease is None or lease.address != address:
            lease = Lease(queue, epoch, address)
        before, queue.lease = queue.lease, lease
        queue.leases[epoch] = lease
        lease.revoked = False
        lease.tried_again()
        admitted = self.admit_waiting(model)
        if before is not None and before is not lease:
            self._retire(before)
        return admitted

    def admit_waiting(self, model: str) -> list[T]:
        """Move as many waiting tickets into flight as there is room for, oldest first; none when
        no lease is usable."""
        queue = self._queues.get(model)
        if queue is None or queue.lease is None or queue.lease.suspect_until is not None:
            return []
        now = self._clock()
        admitted = choose(queue, self._max_in_flight - len(queue.lease.in_flight), now)
        for ticket in admitted:
            del queue.waiting[ticket]
        for ticket in admitted:
            self._admit(ticket, queue.lease, now)
        if queue.trial and (self._wake_at is None or queue.trial_ends < self._wake_at):
            self._wake_at = queue.trial_ends
        if admitted:
            queue.throughput.served(now, len(admitted))
            self._on_change(model)
        return admitted

    def revoke(self, model: str, epoch: str) -> Lease[T] | None:
        """Admit nothing more on this lease; ``on_idle`` is called when nothing is in flight on it,
        at once if so already. None: no such epoch is held."""
        queue = self._queues.get(model)
        lease = queue.leases.get(epoch) if queue else None
        if queue is None or lease is None:
            return None
        if queue.lease is lease:
            queue.lease = None
            if queue.waiting:  # they waited for a place and now wait for the model
                self._on_change(model)
        self._retire(lease)
        return lease

    def _retire(self, lease: Lease[T]) -> None:
        lease.revoked = True
        if not lease.in_flight:
            self.on_idle(lease)

    def forget(self, lease: Lease[T]) -> bool:
        """Drop a revoked and idle lease. False: it is held again or was forgotten already."""
        queue = lease.queue
        if not lease.revoked or lease.in_flight or queue.leases.get(lease.epoch) is not lease:
            return False
        del queue.leases[lease.epoch]
        return True

    def in_flight_on(self, model: str, epoch: str) -> list[T]:
        queue = self._queues.get(model)
        lease = queue.leases.get(epoch) if queue else None
        return list(lease.in_flight) if lease else []

    def refuse(self, model: str) -> list[T]:
        """Take out and return all waiting tickets; the caller answers each."""
        queue = self._queues.get(model)
        if queue is None or not queue.waiting:
            return []
        refused = list(queue.waiting)
        queue.waiting.clear()
        for ticket in refused:
            ticket.stage = ENDED
        self._on_change(model)
        return refused

    # ---- deadlines and failures -----------------------------------------------------------------

    def suspect(self, lease: Lease[T]) -> bool:
        """The engine cannot be reached: new requests wait until the supervisor or the clock says
        otherwise. False when that was known."""
        if lease.revoked or lease.suspect_until is not None:
            return False
        lease.suspect_until = self._clock() + SUSPECT_SECS
        if self._wake_at is None or lease.suspect_until < self._wake_at:
            self._wake_at = lease.suspect_until
        return True

    @property
    def wake_at(self) -> float | None:
        """When ``tick`` must be called, by the injected clock; None: no deadline is set."""
        return self._wake_at

    def tick(self) -> tuple[list[T], list[T]]:
        """Returns (expired, admitted): waiting tickets past their deadline, taken out; and waiting
        tickets now in flight on a lease that was suspect and is tried again."""
        now = self._clock()
        if self._wake_at is None or now < self._wake_at:
            return [], []
        expired: list[T] = []
        admitted: list[T] = []
        upcoming: list[float] = []
        for queue in self._queues.values():
            late = [ticket for ticket in queue.waiting if ticket.deadline <= now]
            for ticket in late:
                del queue.waiting[ticket]
                ticket.stage = ENDED
            expired += late
            lease = queue.lease
            if lease is not None and lease.suspect_until is not None:
                if lease.suspect_until <= now:
                    lease.tried_again()
                    admitted += self.admit_waiting(queue.model)
                else:
                    upcoming.append(lease.suspect_until)
            if queue.trial and queue.trial_ends <= now:
                queue.trial.clear()
                admitted += self.admit_waiting(queue.model)
            if queue.trial:
                upcoming.append(queue.trial_ends)
            upcoming += [ticket.deadline for ticket in queue.waiting]
            if late:
                self._on_change(queue.model)
        self._wake_at = min(upcoming, default=None)
        return expired, admitted

    def close(self) -> list[T]:
        """Stop queueing: take out and return all waiting tickets; the caller answers each."""
        self._closed = True
        return [ticket for model in list(self._queues) for ticket in self.refuse(model)]

    def secs_to_place(self, model: str, coming: float = 0.0) -> float | None:
        """Estimated wait of the last request in the queue if the model is up in ``coming`` seconds;
        None when nothing was measured, or when the model serves and its queue is empty."""
        queue = self._queues.get(model)
        if queue is None or (queue.usable and not queue.waiting):
            return None
        each = queue.throughput.secs_each(self._clock())
        if each is None:
            return None
        place = each * (len(queue.waiting) + 1)
        # Measured since the queue became non-empty, the throughput includes the model's absences.
        return max(coming, place) if queue.throughput.measured else coming + place

    def wanted(self) -> list[str]:
        """Models that requests wait for; those that only lack a free place are not included."""
        return [
            queue.model for queue in self._queues.values() if queue.waiting and not queue.usable
        ]

    # ---- views ----------------------------------------------------------------------------------

    def ahead_of(self, ticket: T) -> int:
        queue = self._queues.get(ticket.model)
        return 0 if queue is None else queue.ahead_of(ticket)

    def _queue(self, model: str) -> ModelQueue[T]:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = ModelQueue(model)
        return queue

    def held(self, model: str) -> Lease[T] | None:
        """The lease that new requests go to, suspect or not."""
        queue = self._queues.get(model)
        return queue.lease if queue else None

    def usable(self, model: str) -> bool:
        """Whether a request for the model could go to its engine now."""
        queue = self._queues.get(model)
        return queue is not None and queue.usable

    def queues(self) -> Iterable[ModelQueue[T]]:
        return self._queues.values()

    def holds(self) -> dict[str, str]:
        """Model → epoch for ``Hello``: the one in use, else one that still drains."""
        held: dict[str, str] = {}
        for queue in self._queues.values():
            if queue.lease is not None:
                held[queue.model] = queue.lease.epoch
            elif queue.leases:
                held[queue.model] = next(reversed(queue.leases))
        return held

    def demand(self, model: str) -> Demand:
        queue = self._queue(model)
        waiting, in_flight = len(queue.waiting), queue.in_flight
        if queue.usable:  # to the supervisor a request that lacks only a place is being served
            waiting, in_flight = 0, in_flight + waiting
        oldest = next(iter(queue.waiting), None) if waiting else None
        return Demand(
            model=model,
            waiting=waiting,
            oldest_age=None if oldest is None else max(0.0, self._clock() - oldest.arrived),
            in_flight=in_flight,
            progress=queue.progress,
            completed=queue.completed,
            repeated=queue.repeated,
        )
