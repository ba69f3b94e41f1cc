"""A request that kills its engine is found, with few deaths, and its neighbours are answered."""

from __future__ import annotations

import pytest

from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.queue import Stage, Ticket
from llmux.gateway.admission.suspects import GROUPS, TRIAL_SECS
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
            self.step()

    def step(self) -> None:
        self.now += 0.1
        self.admission.tick()
        if self.killers & self.in_flight:
            return self.die()
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
    beside = secs > TRIAL_SECS[1][0]  # some have outlived their trials: it must be tried alone
    assert 2 <= server.deaths <= deaths + beside
    assert {ticket.stage for ticket in tickets} == {Stage.ENDED}


@pytest.mark.parametrize("bad", [{2, 6}, {0, 1}, {0, 3, 5, 8}, {0, 1, 2, 3, 4, 5}, set(range(10))])
def test_of_several_bad_ones_each_is_refused_and_nobody_else(bad: set[int]) -> None:
    server = Server()
    tickets = server.send(10)
    server.killers = {tickets[number] for number in bad}
    server.run()
    assert set(server.refused) == server.killers
    assert server.deaths <= 1 + 2 * len(bad)
    assert {ticket.stage for ticket in tickets} == {Stage.ENDED}


def test_one_that_its_client_sends_again_takes_nobody_along() -> None:
    server = Server()
    innocent, sent = server.send(9), 0
    while sent < 4:
        server.killers |= set(server.send(1))
        sent += 1
        innocent += server.send(2)
        while not server.killers <= set(server.refused):
            server.step()
    server.run()
    assert set(server.refused) == server.killers
    assert {ticket.stage for ticket in innocent} == {Stage.ENDED}
    assert server.deaths <= 3 * sent


def test_an_engine_that_died_of_something_else_costs_no_request_its_answer() -> None:
    server = Server()
    server.send(200)
    server.die()
    assert len(server.in_flight) == 200 / GROUPS
    server.run()
    assert not server.refused
    assert server.now <= GROUPS * server.answer_secs + 1


def test_what_comes_meanwhile_waits_until_the_suspects_were_tried_and_is_not_blamed() -> None:
    server = Server()
    (bad, *_) = server.send(3)
    server.killers = {bad}
    server.now += 0.1
    server.die()
    assert len(server.in_flight) == 1
    fresh = server.send(5)
    assert not server.in_flight & set(fresh)
    server.run()
    assert server.refused == [bad]
    assert server.deaths == 2
    assert {(ticket.deaths, ticket.stage) for ticket in fresh} == {(0, Stage.ENDED)}


def test_what_has_begun_to_answer_may_be_the_one() -> None:
    """Whoever is on trial beside it is not named, but tried alone."""
    server = Server()
    begun, other = server.send(2)
    server.now += 0.1
    server.die()
    (first,) = server.in_flight
    server.admission.answered(first)
    (second,) = server.in_flight - {first}
    assert {first, second} == {begun, other}
    server.die()
    assert server.refused == [first], "its answer broke off"
    assert server.in_flight == {second}
    server.run()
    assert server.refused == [first]
    assert second.stage is Stage.ENDED


def test_one_that_an_engine_broke_off_twice_and_lived_is_refused() -> None:
    server = Server()
    odd, *_ = server.send(3)
    for again in (True, False):
        lease = server.admission.held("m")
        assert lease is not None
        server.admission.suspect(lease)
        assert server.admission.wait_again(odd) is again
        server.now += 1.0
        server.admission.tick()
    assert len(server.in_flight) == 3


def test_one_that_reached_no_engine_is_sent_to_each_once_more() -> None:
    server = Server()
    (ticket,) = server.send()
    for number in range(1, 4):
        assert server.admission.wait_again(ticket, begun=False)
        server.admission.admit_waiting("m")
        assert not server.admission.wait_again(ticket, begun=False), "the same engine"
        server.admission.grant("m", f"e{number}", ADDRESS)
        ticket.repeatable = True
        server.admission.leave(ticket)
        (ticket,) = server.send()


def test_the_supervisor_is_told_of_a_search_until_somebody_is_answered() -> None:
    server = Server()
    bad, other = server.send(2)
    assert server.admission.demand("m").repeated == 0
    server.die()
    assert server.admission.demand("m").repeated == 2
    server.killers = {bad}
    while server.refused != [bad]:
        server.step()
    assert server.admission.demand("m").repeated == 1, "it was alone"
    server.run()
    assert other.stage is Stage.ENDED
    assert server.admission.demand("m").repeated == 0


def test_an_engine_that_dies_amid_answers_is_no_search_any_more() -> None:
    server = Server()
    (ticket,) = server.send()
    server.die()
    assert server.admission.demand("m").repeated == 1
    server.admission.answered(ticket)
    server.die()
    assert server.refused == [ticket], "its answer broke off"
    assert server.admission.demand("m").repeated == 0


def test_a_new_engine_takes_who_waited_for_a_trial_that_ends_on_the_old_one() -> None:
    server = Server()
    server.send(2)
    server.die()
    (tried,) = server.in_flight
    server.admission.grant("m", "new", ADDRESS)
    assert not server.in_flight
    server.admission.leave(tried)
    assert len(server.in_flight) == 1


def test_a_long_answer_holds_the_others_up_for_a_moment_only() -> None:
    server = Server()
    server.send(3)
    server.die()
    assert len(server.in_flight) == 1
    server.now += TRIAL_SECS[1][0]
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


def test_one_that_kills_later_than_at_first_takes_nobody_along() -> None:
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
    assert server.refused == [slow]
    server.run()
    assert server.refused == [slow]
    assert {ticket.stage for ticket in others} == {Stage.ENDED}


@pytest.mark.parametrize("granted", [True, False])
@pytest.mark.parametrize("deaths", [1, 2])
def test_an_older_answer_that_ends_does_not_end_the_search(deaths: int, granted: bool) -> None:
    """Else the supervisor does not start the engine at once for who waits to be tried."""
    server = Server(alone=2)
    admission = server.admission
    suspect, begun = server.send(2)
    admission.answered(begun)
    for number in range(deaths):
        if number:
            admission.grant("m", f"e{number}", ADDRESS)
        admission.revoke("m", f"e{number}")
        assert admission.wait_again(suspect)
    if granted:
        admission.grant("m", "next", ADDRESS)
    repeated = {1: 2, 2: 1}[deaths]
    assert admission.demand("m").repeated == repeated
    admission.leave(begun, completed=True)
    assert admission.demand("m").repeated == repeated
    if granted:
        admission.answered(suspect)
        admission.leave(suspect, completed=True)
        assert admission.demand("m").repeated == 0
