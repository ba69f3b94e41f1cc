"""A request that kills its engine is found, with few deaths, and its neighbours are answered."""

from __future__ import annotations

import pytest

from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.queue import Stage, Ticket
from llmux.gateway.admission.suspects import GROUPS, SHORT_TRIAL_SECS
from llmux.protocol import Address

ADDRESS = Address(uds="/e")


class Server:
    """A gateway's worker with one model, whose engine dies of what is in ``killers``."""

    def __init__(self, alone: int = 1, answer_secs: float = 1.0) -> None:
        self.answer_secs = answer_secs
        self.now = 0.0
        self.deaths = 0
        self.killers: set[Ticket] = set()
        self.refused: list[Ticket] = []
        self.sent: list[Ticket] = []
        self.admission: Admission[Ticket] = Admission(
            clock=lambda: self.now, max_waiting=1000, wait_secs=600.0, models=["m"], alone=alone
        )
        self.admission.grant("m", "e0", ADDRESS)

    def send(self, count: int = 1) -> list[Ticket]:
        tickets = [Ticket("m", self.now, self.now + 600.0) for _ in range(count)]
        self.sent += tickets
        for ticket in tickets:
            self.admission.submit(ticket)
        return tickets

    @property
    def in_flight(self) -> set[Ticket]:
        held = self.admission.held("m")
        return set() if held is None else set(held.in_flight)

    def die(self) -> None:
        """The engine dies; everything it had waits again or is refused; the next one is granted."""
        self.deaths += 1
        lease = self.admission.revoke("m", f"e{self.deaths - 1}")
        assert lease is not None
        for ticket in [ticket for ticket in self.sent if ticket in lease.in_flight]:
            if not self.admission.wait_again(ticket):
                self.admission.leave(ticket)
                self.refused.append(ticket)
        self.admission.grant("m", f"e{self.deaths}", ADDRESS)

    def run(self) -> None:
        """Until nothing is in flight: a killer kills 0.1 s after it was sent, all else is answered
        after ``answer_secs``."""
        while self.in_flight:
            self.now += 0.1
            self.admission.tick()
            if self.killers & self.in_flight:
                self.die()
                continue
            for ticket in self.in_flight:
                if self.now - ticket.admitted_at >= self.answer_secs:
                    self.admission.answered(ticket)
                    self.admission.leave(ticket, completed=True)


@pytest.mark.parametrize(("count", "deaths"), [(1, 2), (2, 2), (8, 2), (9, 3), (64, 3), (500, 4)])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("secs", [1.0, 60.0])
def test_one_bad_request_is_refused_alone(count: int, deaths: int, place: str, secs: float) -> None:
    server = Server(answer_secs=secs)
    tickets = server.send(count)
    bad = tickets[{"first": 0, "middle": count // 2, "last": -1}[place]]
    server.killers = {bad}
    server.run()
    assert server.refused == [bad]
    assert 2 <= server.deaths <= deaths
    assert {ticket.stage for ticket in tickets} == {Stage.ENDED}


def test_an_engine_that_died_of_something_else_costs_no_request_its_answer() -> None:
    server = Server()
    server.send(200)
    server.die()
    assert len(server.in_flight) == 200 / GROUPS
    server.run()
    assert not server.refused
    assert server.now <= GROUPS * server.answer_secs + 1


def test_what_comes_meanwhile_waits_for_no_trial_and_is_not_blamed() -> None:
    server = Server()
    (bad, *_) = server.send(3)
    server.killers = {bad}
    server.now += 0.1
    server.die()
    assert len(server.in_flight) == 1
    fresh = server.send(5)
    assert server.in_flight >= set(fresh)
    server.run()
    assert server.refused == [bad]
    assert server.deaths == 2
    assert {ticket.deaths for ticket in fresh} == {0}


def test_a_long_answer_holds_the_others_up_for_a_moment_only() -> None:
    server = Server()
    server.send(3)
    server.die()
    assert len(server.in_flight) == 1
    server.now += SHORT_TRIAL_SECS[0]
    server.admission.tick()
    assert len(server.in_flight) == 2


def test_two_bad_requests_are_found_one_after_the_other() -> None:
    server = Server()
    tickets = server.send(6)
    server.killers = {tickets[1], tickets[4]}
    server.run()
    assert set(server.refused) == server.killers
    assert server.deaths == 3


def test_with_other_workers_being_alone_once_proves_nothing() -> None:
    server = Server(alone=2)
    (only,) = server.send()
    for _ in range(2):
        server.die()
    assert server.in_flight == {only}
    server.die()
    assert server.refused == [only]


def test_one_that_kills_later_than_at_first_costs_one_neighbour_at_most() -> None:
    """It outlives its trial, and whatever is tried then looks like the one."""
    server = Server(answer_secs=60.0)
    slow, *others = server.send(6)
    server.now += 0.1
    server.die()
    while slow.stage is not Stage.ENDED:
        server.now += 0.1
        server.admission.tick()
        if slow in server.in_flight and server.now - slow.admitted_at >= 3.0:
            server.die()
    assert slow in server.refused
    assert len(server.refused) <= 2
    server.run()
    assert len(server.refused) <= 2
    assert {ticket.stage for ticket in others} == {Stage.ENDED}
