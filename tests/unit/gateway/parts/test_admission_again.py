"""Admission where several of something meet: places in the line, leases, deadlines."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway.admission.admission import SUSPECT_SECS, Admission
from llmux.gateway.admission.queue import Lease, ModelQueue, Stage, Ticket
from llmux.protocol import Address

ADDRESS = Address(port=1)


class Desk:
    def __init__(self, **settings: Any) -> None:
        self.now = 100.0
        self.changed: Counter[str] = Counter()
        self.idle: list[str] = []
        self.admission: Admission[Ticket] = Admission(
            **({"max_waiting": 10, "wait_secs": 30.0} | settings),
            clock=lambda: self.now,
            models=("a", "b"),
            on_change=lambda model: self.changed.update([model]),
            on_idle=lambda lease: self.idle.append(lease.epoch),
        )

    def ticket(self, model: str = "a", *, wait: float = 30.0) -> Ticket:
        self.now += 1
        ticket = Ticket(model, self.now, self.now + wait)
        self.admission.submit(ticket)
        return ticket

    def lease(self, model: str = "a") -> Lease[Ticket]:
        held = self.admission.held(model)
        assert held is not None
        return held


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_who_waits_again_is_before_all_that_came_later(dies: int) -> None:
    desk = Desk(max_in_flight=3, alone=10)
    desk.admission.grant("a", "e1", ADDRESS)
    served = [desk.ticket() for _ in range(3)]
    later = [desk.ticket() for _ in range(3)]
    desk.admission.revoke("a", "e1")
    order = [served[dies], *(one for one in served if one is not served[dies])]
    for ticket in order:
        assert desk.admission.wait_again(ticket)
    queue = next(queue for queue in desk.admission.queues() if queue.model == "a")
    assert list(queue.waiting) == [*served, *later]
    assert all(ticket.stage is Stage.WAITING for ticket in served)
    assert all(ticket.deadline == desk.now + 30.0 for ticket in served)


def test_each_deadline_that_passes_is_said_of_its_own_model() -> None:
    desk = Desk()
    first, second = desk.ticket("a", wait=5.0), desk.ticket("b", wait=10.0)
    desk.changed.clear()
    assert desk.admission.tick() == ([], [])
    assert not desk.changed
    desk.now = first.deadline
    assert desk.admission.tick() == ([first], [])
    assert desk.changed == {"a": 1}
    assert (first.stage, second.stage) == (Stage.ENDED, Stage.WAITING)
    desk.now = second.deadline
    assert desk.admission.tick() == ([second], [])
    assert desk.changed == {"a": 1, "b": 1}


def test_a_model_is_wanted_while_requests_lack_more_than_a_place() -> None:
    desk = Desk(max_in_flight=1, alone=10)
    assert desk.admission.wanted() == []
    desk.ticket("b")
    desk.ticket()
    assert sorted(desk.admission.wanted()) == ["a", "b"]
    desk.admission.grant("a", "e1", ADDRESS)
    desk.ticket()
    assert len(desk.lease().queue.waiting) == 1, "for the place of the one in flight"
    assert desk.admission.wanted() == ["b"]


def test_a_lease_is_idle_when_it_is_revoked_and_nothing_is_in_flight() -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    desk.admission.revoke("a", "e1")
    assert desk.idle == ["e1"], "at once"
    desk.admission.grant("a", "e2", ADDRESS)
    ticket = desk.ticket()
    lease = desk.admission.revoke("a", "e2")
    assert desk.idle == ["e1"]
    assert lease is not None
    assert not desk.admission.forget(lease), "something is in flight on it"
    desk.admission.leave(ticket, completed=True)
    assert desk.idle == ["e1", "e2"]
    assert desk.admission.forget(lease)
    assert not desk.admission.forget(lease)
    assert desk.admission.revoke("a", "e2") is None
    assert desk.admission.revoke("b", "e2") is None


def test_a_newer_lease_retires_the_older_one_and_the_same_one_does_not() -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    ticket, before = desk.ticket(), desk.lease()
    desk.admission.grant("a", "e1", ADDRESS)
    assert desk.lease() is before
    assert [before.revoked] == [False]
    desk.admission.grant("a", "e2", Address(port=2))
    assert [before.revoked] == [True]
    assert desk.idle == []
    desk.admission.leave(ticket)
    assert desk.idle == ["e1"]
    assert desk.lease().epoch == "e2"


@pytest.mark.parametrize(
    ("lease", "reason"), [(True, Reason.OVERLOADED), (False, Reason.QUEUE_FULL)]
)
def test_the_line_has_an_end_before_a_model_that_serves_and_before_one_that_does_not(
    lease: bool, reason: Reason
) -> None:
    desk = Desk(max_waiting=2, max_in_flight=1)
    if lease:
        desk.admission.grant("a", "e1", ADDRESS)
        desk.ticket()
    for _ in range(2):
        desk.ticket()
    with pytest.raises(Refused) as refused:
        desk.ticket()
    assert refused.value.reason is reason
    desk.ticket("b")
    assert desk.changed["a"] == (3 if lease else 2)


def test_an_engine_that_refused_is_tried_again_after_a_while() -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    ticket = Ticket("a", desk.now, desk.now + 60.0)
    assert desk.admission.suspect(desk.lease())
    assert not desk.admission.suspect(desk.lease()), "known"
    assert desk.admission.submit(ticket) is None
    assert desk.admission.demand("a").waiting == 1
    assert desk.admission.wake_at == desk.now + SUSPECT_SECS
    assert desk.admission.tick() == ([], [])
    desk.now += SUSPECT_SECS
    assert desk.admission.tick() == ([], [ticket])
    assert ticket.stage is Stage.IN_FLIGHT


def test_each_place_in_the_line_is_known() -> None:
    desk = Desk(max_in_flight=1)
    desk.admission.grant("a", "e1", ADDRESS)
    tickets = [desk.ticket() for _ in range(4)]
    assert [desk.admission.ahead_of(ticket) for ticket in tickets] == [0, 0, 1, 2]
    desk.admission.leave(tickets[1])
    assert [desk.admission.ahead_of(ticket) for ticket in tickets] == [0, 0, 0, 1]


def test_a_death_that_came_sooner_makes_no_trial_shorter() -> None:
    desk = Desk(alone=10)
    ticket = desk.ticket()
    for epoch, lived in (("e1", 7.0), ("e2", 0.5)):
        desk.admission.grant("a", epoch, ADDRESS)
        desk.now += lived
        desk.admission.revoke("a", epoch)
        assert desk.admission.wait_again(ticket)
    desk.admission.grant("a", "e3", ADDRESS)
    (queue,) = desk.admission.queues()
    assert queue.trial_ends == desk.now + 2 * 7.0


def test_how_long_an_engine_lived_with_a_ticket_is_known_and_bounds_its_trial() -> None:
    desk = Desk(max_in_flight=1)
    ticket = desk.ticket()
    for epoch, lived, trial in (("e1", 3.0, 6.0), ("e2", 4.0, 8.0)):
        desk.admission.grant("a", epoch, ADDRESS)
        desk.now += lived
        desk.admission.revoke("a", epoch)
        ticket.deaths = 0
        assert desk.admission.wait_again(ticket)
        assert ticket.lived == lived
        desk.admission.grant("a", epoch + "'", ADDRESS)
        (queue,) = desk.admission.queues()
        assert queue.trial_ends == desk.now + trial
        desk.admission.answered(ticket)
        assert (ticket.deaths, queue.trial, ticket.repeatable) == (0, set(), False)
        ticket.repeatable = True
        desk.admission.revoke("a", epoch + "'")
        desk.admission.wait_again(ticket, begun=False)
        ticket.deaths = 0


@pytest.mark.parametrize("how", ["granted", "after a while"])
def test_an_engine_that_is_tried_again_may_live_and_its_death_is_of_the_past(how: str) -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    tickets, lease = [desk.ticket() for _ in range(2)], desk.lease()
    assert desk.admission.suspect(lease)
    for ticket in tickets:
        assert desk.admission.wait_again(ticket)
        assert ticket.lease is None
    assert (lease.died_with, lease.open, lease.suspect_until is None) == (2, False, False)
    if how == "granted":
        assert len(desk.admission.grant("a", "e1", ADDRESS)) == 1
    else:
        desk.now += SUSPECT_SECS
        expired, admitted = desk.admission.tick()
        assert (expired, len(admitted)) == ([], 1)
    assert desk.lease() is lease
    assert (lease.died_with, lease.suspect_until, len(lease.in_flight)) == (None, None, 1)


def test_a_lease_begins_without_a_death() -> None:
    lease: Lease[Ticket] = Lease(ModelQueue("a"), "e1", ADDRESS)
    assert (lease.model, lease.epoch, lease.address) == ("a", "e1", ADDRESS)
    assert (lease.revoked, lease.suspect_until, lease.pool) == (False, None, None)
    assert (lease.died_with, lease.open) == (None, True)
    assert (lease.in_flight, lease.reported_at) == (set(), float("-inf"))


@pytest.mark.parametrize(
    ("coming", "moving", "new"), [(0.0, 21.0, 14.0), (10.0, 21.0, 24.0), (40.0, 40.0, 54.0)]
)
def test_the_last_place_of_a_line_is_some_time_away(
    coming: float, moving: float, new: float
) -> None:
    desk = Desk(max_in_flight=1)
    assert desk.admission.secs_to_place("a", coming) is None
    first, *others = (desk.ticket() for _ in range(3))
    assert desk.admission.secs_to_place("a", coming) is None, "nothing was measured"
    desk.now += 5.0
    assert desk.admission.grant("a", "e1", ADDRESS) == [first]
    desk.admission.revoke("a", "e1")
    (queue,) = desk.admission.queues()
    assert [queue.throughput.measured] == [True]
    assert desk.admission.secs_to_place("a", coming) == moving, "the pace has its absences in it"
    for ticket in others:
        desk.admission.leave(ticket)
    assert desk.admission.secs_to_place("a", coming) == max(coming, 7.0), "for the next one"
    desk.ticket()
    assert [queue.throughput.measured] == [False]
    assert desk.admission.secs_to_place("a", coming) == new


def test_each_change_of_demand_is_said_once() -> None:
    desk = Desk(max_in_flight=1)

    def changes() -> int:
        count, desk.changed["a"] = desk.changed["a"], 0
        return count

    desk.admission.leave(Ticket("a", 0.0, 1.0))
    assert (changes(), desk.admission.refuse("a"), desk.admission.refuse("else")) == (0, [], [])
    first, second = desk.ticket(), desk.ticket()
    assert changes() == 2
    assert desk.admission.grant("a", "e1", ADDRESS) == [first]
    assert changes() == 1
    desk.admission.revoke("a", "e1")
    assert changes() == 1, "the second one waits for the model now, not for a place"
    desk.admission.leave(first)
    assert changes() == 1
    assert desk.admission.refuse("a") == [second]
    assert (changes(), second.stage) == (1, Stage.ENDED)
    assert (desk.admission.refuse("a"), changes()) == ([], 0)
    desk.admission.grant("a", "e2", ADDRESS)
    desk.admission.revoke("a", "e2")
    assert changes() == 0, "nobody waits"


def test_the_next_look_is_at_the_first_deadline_of_any_kind() -> None:
    desk = Desk()
    late, soon = desk.ticket(wait=30.0), desk.ticket("b", wait=5.0)
    assert desk.admission.wake_at == soon.deadline
    assert desk.admission.tick() == ([], [])
    desk.admission.grant("a", "e1", ADDRESS)
    desk.now = soon.deadline - SUSPECT_SECS / 2
    desk.admission.suspect(desk.lease())
    assert desk.admission.wait_again(late)
    desk.now = soon.deadline
    assert desk.admission.tick() == ([soon], [])
    assert desk.admission.wake_at == desk.lease().suspect_until == desk.now + SUSPECT_SECS / 2


def test_a_trial_goes_on_while_others_deadlines_pass() -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    tickets = [desk.ticket(), desk.ticket()]
    desk.admission.revoke("a", "e1")
    assert all(desk.admission.wait_again(ticket) for ticket in tickets)
    (tried,) = desk.admission.grant("a", "e2", ADDRESS)
    (queue,) = desk.admission.queues()
    hurried = Ticket("b", desk.now, desk.now + 0.5)
    desk.admission.submit(hurried)
    desk.now = hurried.deadline
    assert desk.admission.tick() == ([hurried], [])
    assert (queue.trial, desk.admission.wake_at) == ({tried}, queue.trial_ends)
    (other,) = (one for one in tickets if one is not tried)
    desk.now = queue.trial_ends
    assert desk.admission.tick() == ([], [other])
    assert (queue.trial, desk.admission.wake_at) == ({other}, queue.trial_ends)


def test_who_is_answered_makes_room_for_the_next_to_be_tried() -> None:
    desk = Desk()
    room: list[Ticket] = []
    desk.admission.on_room = room.extend
    desk.admission.grant("a", "e1", ADDRESS)
    tickets = [desk.ticket() for _ in range(3)]
    desk.admission.revoke("a", "e1")
    assert all(desk.admission.wait_again(ticket) for ticket in tickets)
    tried = desk.admission.grant("a", "e2", ADDRESS)
    for count in (1, 2):
        assert (len(tried), tried[-1].deaths) == (count, 1)
        desk.admission.answered(tried[-1])
        assert (len(room), tried[-1].deaths, tried[-1].repeatable) == (count, 0, False)
        tried.append(room[-1])
    assert set(tried) == set(tickets)
    fresh = desk.ticket()
    assert fresh.stage is Stage.WAITING
    desk.admission.answered(tried[0])
    assert fresh.stage is Stage.WAITING, "it had its answer: one is still tried"
    desk.admission.answered(tried[-1])
    assert room[-1] is fresh


def test_a_lease_that_is_granted_again_while_it_drains_goes_on() -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    ticket, lease = desk.ticket(), desk.lease()
    desk.admission.revoke("a", "e1")
    desk.admission.grant("a", "e1", ADDRESS)
    desk.admission.leave(ticket)
    assert (desk.lease() is lease, lease.revoked, desk.idle) == (True, False, [])
    assert not desk.admission.forget(lease)


def test_an_engine_elsewhere_is_another_one_whatever_its_epoch() -> None:
    desk = Desk()
    desk.admission.grant("a", "e1", ADDRESS)
    ticket, before = desk.ticket(), desk.lease()
    desk.admission.grant("a", "e1", Address(port=2))
    after = desk.lease()
    assert (before.revoked, after.address, after.revoked) == (True, Address(port=2), False)
    fresh = desk.ticket()
    assert (before.in_flight, after.in_flight) == ({ticket}, {fresh})
    desk.admission.leave(ticket)
    assert (desk.idle, desk.admission.forget(before)) == (["e1"], False)
    assert desk.lease() is after


def test_a_model_that_nobody_waits_for_is_not_wanted() -> None:
    desk = Desk()
    for model in "ab":
        desk.admission.grant(model, "e1", ADDRESS)
        desk.admission.revoke(model, "e1")
    assert desk.admission.wanted() == []
    desk.ticket("b")
    assert desk.admission.wanted() == ["b"]


def test_only_what_is_in_flight_waits_again() -> None:
    desk = Desk(max_in_flight=1)
    desk.admission.grant("a", "e1", ADDRESS)
    served, waiting = desk.ticket(), desk.ticket()
    ended, new = desk.ticket(), Ticket("a", desk.now, desk.now + 1.0)
    desk.admission.leave(ended)
    desk.admission.leave(served, completed=True)
    assert (waiting.in_flight, desk.admission.demand("a").completed) == (True, 1)
    last = desk.ticket()
    before = desk.admission.demand("a")
    for ticket in (served, last, ended, new):
        for begun in (True, False):
            stage = ticket.stage
            assert not desk.admission.wait_again(ticket, begun=begun)
            assert (ticket.stage, ticket.deaths, ticket.unreached) == (stage, 0, None)
    assert desk.admission.demand("a") == before
    desk.admission.answered(waiting)
    for begun in (True, False):
        assert not desk.admission.wait_again(waiting, begun=begun), "its answer has begun"
        assert (waiting.in_flight, waiting.deaths) == (True, 0)
