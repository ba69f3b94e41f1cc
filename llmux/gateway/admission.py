"""Who may go to an engine now and who waits: the state one gateway worker keeps per model.

Pure bookkeeping: no I/O, no asyncio, the clock is handed in. ``Gateway`` (gateway.py) owns the one
instance, calls it from the event loop only, and does what the returned values say.

Invariants, tested by tests/properties/test_admission.py:

- a ticket is NEW, WAITING, IN_FLIGHT or ENDED; every list returned here moves its tickets first, so
  no ticket is handed out twice for one move and every waiter is answered exactly once;
- a ticket in flight is counted on exactly one lease from before its request is written until its
  last byte, its failure or its client's departure;
- nothing is admitted on a revoked lease, or above ``max_in_flight`` on one;
- nobody waits while a usable lease with room is held, and nobody overtakes who waits;
- whoever waited is counted in flight by ``grant`` itself, so a revoke read after it waits for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import islice

from llmux.errors import Reason, Refused
from llmux.gateway.tickets import Lease, Line, Stage, Ticket
from llmux.protocol import Address, Demand

# How long an engine that refused a connection is left alone when the supervisor says nothing about
# it (it may be away). Then the grant is tried once more; a second failure is the client's answer.
SUSPECT_SECS = 1.0


class Admission:
    """See the module. ``on_change(model)``: its demand changed. ``on_idle(lease)``: a revoked lease
    has nothing in flight any more. ``on_room(tickets)``: these got the places that became free."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        max_waiting: int,
        wait_secs: float,
        max_in_flight: int = sys.maxsize,
        models: Iterable[str] = (),
        on_change: Callable[[str], None] = lambda _model: None,
        on_idle: Callable[[Lease], None] = lambda _lease: None,
        on_room: Callable[[list[Ticket]], None] = lambda _tickets: None,
    ) -> None:
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._on_room = on_room
        self._max_waiting = max_waiting
        self.wait_secs = wait_secs
        self._on_change = on_change
        self._on_idle = on_idle
        self._lines: dict[str, Line] = {}
        self._known: frozenset[str] = frozenset(models)
        self._closed = False
        self._wake_at: float | None = None  # never later than the first deadline

    # ---- requests -------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> Lease | None:
        """The lease the ticket is now in flight on, or None when it waits. Raises Refused."""
        line = self._lines.get(ticket.model)
        if line is None or line.lease is None or line.lease.suspect_until is not None:
            self._enqueue(ticket, line)
            return None
        if len(line.lease.in_flight) >= self._max_in_flight:
            self._enqueue(ticket, line)
            return None
        self._admit(ticket, line.lease)
        self._on_change(ticket.model)
        return line.lease

    def _enqueue(self, ticket: Ticket, line: Line | None) -> None:
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
        line = line or self._line(ticket.model)
        if len(line.waiting) >= self._max_waiting and line.usable:
            raise Refused(
                Reason.OVERLOADED,
                f'model "{ticket.model}" has {line.in_flight} requests to answer and '
                f"{len(line.waiting)} wait",
                hint="try again later",
            )
        if len(line.waiting) >= self._max_waiting:
            raise Refused(
                Reason.QUEUE_FULL,
                f'cannot wait for model "{ticket.model}": {len(line.waiting)} requests wait for it',
                hint="try again later, or raise gateway.max_waiting",
            )
        self._wait(ticket, line)

    def _wait(self, ticket: Ticket, line: Line) -> None:
        if not line.waiting:
            line.departures.begins(self._clock())
        ticket.stage = Stage.WAITING
        line.waiting[ticket] = None
        if self._wake_at is None or ticket.deadline < self._wake_at:
            self._wake_at = ticket.deadline
        self._on_change(line.model)

    @staticmethod
    def _admit(ticket: Ticket, lease: Lease) -> None:
        ticket.stage = Stage.IN_FLIGHT
        ticket.lease = lease
        lease.in_flight.add(ticket)
        lease.line.in_flight += 1

    def leave(self, ticket: Ticket, *, completed: bool = False) -> None:
        """The request is over for whatever reason. Does nothing when it was over already."""
        if ticket.stage is Stage.IN_FLIGHT:
            self._land(ticket)
            if completed and ticket.lease is not None:
                ticket.lease.line.completed += 1
        elif ticket.stage is Stage.WAITING:
            del self._lines[ticket.model].waiting[ticket]
        else:
            ticket.stage = Stage.ENDED
            return
        ticket.stage = Stage.ENDED
        self._on_change(ticket.model)

    def _land(self, ticket: Ticket) -> None:
        lease = ticket.lease
        assert lease is not None, "a ticket in flight has a lease"
        lease.in_flight.remove(ticket)
        line = lease.line
        line.in_flight -= 1
        if lease.revoked:
            if not lease.in_flight:
                self._on_idle(lease)
        elif line.waiting and line.usable:
            self._on_room(self.admit_waiting(line.model))

    def wait_again(self, ticket: Ticket) -> bool:
        """From in flight back to its place among the waiters, once and only before the first byte.

        The wait gets a full deadline anew: what it waits for now may be a cold start. When True is
        returned the caller must call ``admit_waiting``: a newer lease may be held already.
        """
        if ticket.stage is not Stage.IN_FLIGHT or ticket.retried or not ticket.repeatable:
            return False
        if self._closed:
            return False
        self._land(ticket)
        ticket.retried = True
        ticket.lease = None
        ticket.deadline = min(self._clock() + self.wait_secs, ticket.limit)
        line = self._line(ticket.model)
        later = line.waiting
        self._wait(ticket, line)
        if len(later) > 1:
            line.waiting = dict.fromkeys(sorted(later, key=lambda waiter: waiter.arrived))
        return True

    # ---- what the supervisor says ---------------------------------------------------------------

    def set_models(self, models: Iterable[str]) -> None:
        """The catalog. Who waits for a model that went is refused by the supervisor, not by us."""
        self._known = frozenset(models)

    def grant(self, model: str, epoch: str, address: Address) -> list[Ticket]:
        """All waiters, now in flight on the lease of ``epoch`` (``line(model).lease``).

        The same epoch granted again is what a supervisor says that came back: the lease goes on.
        """
        line = self._line(model)
        lease = line.leases.get(epoch)
        if lease is None or lease.address != address:
            lease = Lease(line, epoch, address)
        before, line.lease = line.lease, lease
        line.leases[epoch] = lease
        lease.revoked = False
        lease.suspect_until = None
        admitted = self.admit_waiting(model)
        if before is not None and before is not lease:
            self._retire(before)
        return admitted

    def admit_waiting(self, model: str) -> list[Ticket]:
        """Those who waited and are now in flight, oldest first, as many as there is room for; none
        when no lease is usable."""
        line = self._lines.get(model)
        if line is None or line.lease is None or line.lease.suspect_until is not None:
            return []
        room = self._max_in_flight - len(line.lease.in_flight)
        admitted = (
            list(line.waiting)
            if room >= len(line.waiting)
            else list(islice(line.waiting, max(0, room)))
        )
        for ticket in admitted:
            del line.waiting[ticket]
        for ticket in admitted:
            self._admit(ticket, line.lease)
        if admitted:
            line.departures.left(self._clock(), len(admitted))
            self._on_change(model)
        return admitted

    def revoke(self, model: str, epoch: str) -> Lease | None:
        """Nothing new goes to this lease; ``on_idle`` is called for it when nothing is in flight,
        at once if so already. None: no such epoch is held."""
        line = self._lines.get(model)
        lease = line.leases.get(epoch) if line else None
        if line is None or lease is None:
            return None
        if line.lease is lease:
            line.lease = None
            if line.waiting:  # they waited for a place, and now for the model
                self._on_change(model)
        self._retire(lease)
        return lease

    def _retire(self, lease: Lease) -> None:
        lease.revoked = True
        if not lease.in_flight:
            self._on_idle(lease)

    def forget(self, lease: Lease) -> bool:
        """A revoked and idle lease is done with. False: it is held again or was forgotten."""
        line = lease.line
        if not lease.revoked or lease.in_flight or line.leases.get(lease.epoch) is not lease:
            return False
        del line.leases[lease.epoch]
        return True

    def in_flight_on(self, model: str, epoch: str) -> list[Ticket]:
        line = self._lines.get(model)
        lease = line.leases.get(epoch) if line else None
        return list(lease.in_flight) if lease else []

    def refuse(self, model: str) -> list[Ticket]:
        """All waiters, taken out; the caller answers each."""
        line = self._lines.get(model)
        if line is None or not line.waiting:
            return []
        refused = list(line.waiting)
        line.waiting.clear()
        for ticket in refused:
            ticket.stage = Stage.ENDED
        self._on_change(model)
        return refused

    # ---- time and trouble -----------------------------------------------------------------------

    def suspect(self, lease: Lease) -> bool:
        """The engine could not be talked to: new requests wait until the supervisor or the clock
        says otherwise. False when that was known."""
        if lease.revoked or lease.suspect_until is not None:
            return False
        lease.suspect_until = self._clock() + SUSPECT_SECS
        if self._wake_at is None or lease.suspect_until < self._wake_at:
            self._wake_at = lease.suspect_until
        return True

    @property
    def wake_at(self) -> float | None:
        """When ``tick`` wants to be called, by the injected clock; None = nothing is due."""
        return self._wake_at

    def tick(self) -> tuple[list[Ticket], list[Ticket]]:
        """(waiters whose deadline passed, taken out; waiters now in flight on a lease that was
        suspect and is to be tried again)."""
        now = self._clock()
        if self._wake_at is None or now < self._wake_at:
            return [], []
        expired: list[Ticket] = []
        admitted: list[Ticket] = []
        upcoming: list[float] = []
        for line in self._lines.values():
            late = [ticket for ticket in line.waiting if ticket.deadline <= now]
            for ticket in late:
                del line.waiting[ticket]
                ticket.stage = Stage.ENDED
            expired += late
            lease = line.lease
            if lease is not None and lease.suspect_until is not None:
                if lease.suspect_until <= now:
                    lease.suspect_until = None
                    admitted += self.admit_waiting(line.model)
                else:
                    upcoming.append(lease.suspect_until)
            upcoming += [ticket.deadline for ticket in line.waiting]
            if late:
                self._on_change(line.model)
        self._wake_at = min(upcoming, default=None)
        return expired, admitted

    def close(self) -> list[Ticket]:
        """Nobody waits any more: all waiters of all models, taken out; the caller answers each."""
        self._closed = True
        return [ticket for model in list(self._lines) for ticket in self.refuse(model)]

    def secs_to_place(self, model: str, coming: float = 0.0) -> float | None:
        """How long the last in line will wait, the model serving in ``coming`` seconds; None when
        nobody was ever seen to leave that line, or the model serves and nobody waits."""
        line = self._lines.get(model)
        if line is None or (line.usable and not line.waiting):
            return None
        each = line.departures.secs_each(self._clock())
        if each is None:
            return None
        place = each * (len(line.waiting) + 1)
        # The pace of a line that moved before has such absences in it.
        return max(coming, place) if line.departures.begun else coming + place

    def wanted(self) -> list[str]:
        """Models that are waited for, and not only for a place."""
        return [line.model for line in self._lines.values() if line.waiting and not line.usable]

    # ---- views ----------------------------------------------------------------------------------

    def _line(self, model: str) -> Line:
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = Line(model)
        return line

    def held(self, model: str) -> Lease | None:
        """The lease that new requests go to, suspect or not."""
        line = self._lines.get(model)
        return line.lease if line else None

    def lines(self) -> Iterable[Line]:
        return self._lines.values()

    def holds(self) -> dict[str, str]:
        """Model → epoch for ``hello``: the one in use, else one that still drains."""
        held: dict[str, str] = {}
        for line in self._lines.values():
            if line.lease is not None:
                held[line.model] = line.lease.epoch
            elif line.leases:
                held[line.model] = next(reversed(line.leases))
        return held

    def demand(self, model: str) -> Demand:
        line = self._line(model)
        waiting, in_flight = len(line.waiting), line.in_flight
        if line.usable:  # who waits only for a place is served already, as the supervisor sees it
            waiting, in_flight = 0, in_flight + waiting
        oldest = next(iter(line.waiting), None) if waiting else None
        return Demand(
            model=model,
            waiting=waiting,
            oldest_age=None if oldest is None else max(0.0, self._clock() - oldest.arrived),
            in_flight=in_flight,
            progress=line.progress,
            completed=line.completed,
        )
