"""Admission against a plain model of its rules, under any order of events."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmux.errors import Reason, Refused
from llmux.gateway.admission.admission import SUSPECT_SECS, Admission
from llmux.gateway.admission.queue import Lease, Stage, Ticket
from llmux.gateway.admission.suspects import MAX_DEATHS
from llmux.protocol import Address

MODELS = ("a", "b")
WAIT = 10.0
MAX_WAITING = 4
MAX_IN_FLIGHT = 3

models = st.sampled_from(MODELS)


class Gateway(RuleBasedStateMachine):
    """Plays the gateway: every ticket handed out is answered, exactly as gateway.py would."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.epochs = 0
        self.tickets: list[Ticket] = []
        self.answers: Counter[Ticket] = Counter()
        self.drained: list[Lease[Ticket]] = []
        self.closed = False
        self.admission = Admission(
            clock=lambda: self.now,
            max_waiting=MAX_WAITING,
            wait_secs=WAIT,
            max_in_flight=MAX_IN_FLIGHT,
            models=MODELS,
            on_idle=self.on_idle,
            on_room=self.check_admitted,
        )

    def on_idle(self, lease: Lease[Ticket]) -> None:
        assert lease.revoked
        assert not lease.in_flight
        if self.admission.forget(lease):
            self.drained.append(lease)

    def answer(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            assert ticket.stage is Stage.ENDED
            self.answers[ticket] += 1

    def waiting(self, model: str) -> int:
        return sum(ticket.model == model for ticket in self.in_stage(Stage.WAITING))

    def in_stage(self, stage: Stage) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.stage is stage]

    def check_admitted(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            assert ticket.stage is Stage.IN_FLIGHT
            assert ticket.lease is not None
            assert ticket in ticket.lease.in_flight
            assert not ticket.lease.revoked
            assert len(ticket.lease.in_flight) <= MAX_IN_FLIGHT
        assert tickets == sorted(tickets, key=lambda ticket: ticket.arrived)

    # ---- clients --------------------------------------------------------------------------------

    @rule(model=models)
    def submit(self, model: str) -> None:
        ticket = Ticket(model, self.now, self.now + WAIT)
        held = self.admission.held(model)
        usable = held is not None and held.suspect_until is None
        room = held is not None and held.open and len(held.in_flight) < MAX_IN_FLIGHT
        waiting = self.waiting(model)
        try:
            lease = self.admission.submit(ticket)
        except Refused as refused:
            assert not room
            full = Reason.OVERLOADED if usable else Reason.QUEUE_FULL
            assert refused.reason is (Reason.SHUTTING_DOWN if self.closed else full)
            assert self.closed or waiting >= MAX_WAITING
            return
        self.tickets.append(ticket)
        assert (lease is held) if room else (lease is None)
        if lease is not None:
            self.check_admitted([ticket])

    @rule()
    def unknown_model(self) -> None:
        try:
            self.admission.submit(Ticket("nobody", self.now, self.now + WAIT))
        except Refused as refused:
            assert refused.reason is Reason.UNKNOWN_MODEL
        else:
            raise AssertionError("an unknown model was let in")

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), completed=st.booleans())
    def leave(self, data: st.DataObject, completed: bool) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        over = ticket.stage is Stage.ENDED
        self.admission.leave(ticket, completed=completed)
        assert ticket.stage is Stage.ENDED
        if not over:
            self.answers[ticket] += 1

    @precondition(lambda self: self.in_stage(Stage.IN_FLIGHT))
    @rule(data=st.data())
    def first_byte(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.in_stage(Stage.IN_FLIGHT)))
        self.admission.answered(ticket)
        assert (ticket.repeatable, ticket.deaths) == (False, 0)

    # ---- the supervisor -------------------------------------------------------------------------

    @rule(model=models, again=st.booleans())
    def grant(self, model: str, again: bool) -> None:
        held = self.admission.held(model)
        if again and held is not None:
            epoch = held.epoch
        else:
            self.epochs += 1
            epoch = f"e{self.epochs}"
        admitted = self.admission.grant(model, epoch, Address(uds=f"/{model}"))
        self.check_admitted(admitted)
        assert self.admission.demand(model).waiting == 0

    @rule(model=models)
    def revoke(self, model: str) -> None:
        held = self.admission.held(model)
        lease = self.admission.revoke(model, held.epoch if held else "never")
        assert lease is held
        assert self.admission.held(model) is None

    @rule(model=models)
    def dead(self, model: str) -> None:
        held = self.admission.held(model)
        if held is None:
            return
        self.admission.revoke(model, held.epoch)
        self.fail(self.on(held))
        assert held in self.drained

    def on(self, lease: Lease[Ticket]) -> list[Ticket]:
        """In one order: that of a set is another in every run, and no failure could be repeated."""
        return [ticket for ticket in self.tickets if ticket in lease.in_flight]

    def fail(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            lease = ticket.lease
            assert lease is not None
            broken = ticket.broken_on if ticket.deaths else None
            may = self.admission.wait_again(ticket)
            assert ticket.repeatable or not may
            assert not (self.closed and may)
            if may:
                assert ticket.deaths <= MAX_DEATHS
                self.check_admitted(self.admission.admit_waiting(ticket.model))
            else:
                alone = lease.died_with == 1 and ticket.deaths > 1
                bad = alone or broken is lease or ticket.deaths > MAX_DEATHS
                assert bad or self.closed or not ticket.repeatable
                self.admission.leave(ticket)
                self.answers[ticket] += 1

    @rule(model=models)
    def engine_refuses(self, model: str) -> None:
        held = self.admission.held(model)
        if held is None or not held.in_flight:
            return
        self.admission.suspect(held)
        self.fail(self.on(held)[:1])

    @rule(model=models)
    def refuse(self, model: str) -> None:
        self.answer(self.admission.refuse(model))
        assert self.admission.demand(model).waiting == 0

    @rule(seconds=st.floats(0.01, WAIT))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        expired, admitted = self.admission.tick()
        self.answer(expired)
        assert all(ticket.deadline <= self.now for ticket in expired)
        for ticket in admitted:
            self.check_admitted([ticket])

    @precondition(lambda self: not self.closed)
    @rule(really=st.integers(0, 20))
    def close(self, really: int) -> None:
        if really == 0:
            self.closed = True
            self.answer(self.admission.close())

    # ---- what holds at all times ----------------------------------------------------------------

    @invariant()
    def everyone_is_answered_once_and_counted_once(self) -> None:
        for ticket in self.tickets:
            assert self.answers[ticket] == (ticket.stage is Stage.ENDED)
        for model in MODELS:
            demand = self.admission.demand(model)
            mine = [ticket for ticket in self.tickets if ticket.model == model]
            waiting = [ticket for ticket in mine if ticket.stage is Stage.WAITING]
            in_flight = sum(t.stage is Stage.IN_FLIGHT for t in mine)
            held = self.admission.held(model)
            if held is not None and held.suspect_until is None:
                assert (demand.waiting, demand.in_flight) == (0, len(waiting) + in_flight)
                full = len(held.in_flight) == MAX_IN_FLIGHT
                assert full or not waiting or held.queue.trial
                continue
            assert (demand.waiting, demand.in_flight) == (len(waiting), in_flight)
            if waiting:
                assert demand.oldest_age == self.now - min(t.arrived for t in waiting)

    @invariant()
    def nothing_is_late_and_the_clock_is_asked_in_time(self) -> None:
        wake_at = self.admission.wake_at
        for ticket in self.in_stage(Stage.WAITING):
            assert wake_at is not None
            assert wake_at <= ticket.deadline
        for queue in self.admission.queues():
            for ticket in queue.trial:
                assert (ticket.stage, ticket.deaths > 0) == (Stage.IN_FLIGHT, True)
                assert wake_at is not None
                assert wake_at <= queue.trial_ends
        for model in MODELS:
            held = self.admission.held(model)
            if held is not None and held.suspect_until is not None:
                assert wake_at is not None
                assert wake_at <= held.suspect_until <= self.now + SUSPECT_SECS

    @invariant()
    def a_drained_lease_is_empty_and_stays_so(self) -> None:
        for lease in self.drained:
            assert lease.revoked
            assert not lease.in_flight


TestAdmission = Gateway.TestCase
TestAdmission.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
