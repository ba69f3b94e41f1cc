"""Whatever kills engines is refused, and nobody else, however requests come and engines answer."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log

from hypothesis import event, given, settings
from hypothesis import strategies as st

from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.queue import Stage, Ticket
from llmux.gateway.admission.suspects import GROUPS, TRIAL_SECS
from llmux.protocol import Address

ADDRESS = Address(uds="/e")
START_SECS = 5.0
FIRST_TRIAL_SECS = TRIAL_SECS[1][0]


@dataclass(frozen=True)
class Request:
    """``kills``: so long after it was sent its engine dies; inf: never."""

    comes: float
    first_byte: float
    rest: float
    kills: float = inf


def requests(kills: float) -> st.SearchStrategy[list[Request]]:
    comes = st.sampled_from([0.0, 0.0, 0.05, 1.0, 3.0, 10.0, 30.0])
    secs = st.sampled_from([0.0, 0.1, 1.0, 4.0, 60.0])
    innocent = st.builds(Request, comes, secs, secs)
    poison = st.builds(Request, comes, st.just(inf), st.just(0.0), st.floats(0.01, kills))
    return st.lists(innocent | innocent | poison, min_size=1, max_size=40)


class World:
    """One worker, one model, and engines that die of poisons and of nothing else."""

    def __init__(self, requests: list[Request], order: st.DataObject) -> None:
        self.now = 0.0
        self.deaths = 0
        self.up_at = 0.0  # when the next engine is up, or inf: one is
        self.order = order
        self.to_come = sorted(requests, key=lambda request: request.comes)
        self.of: dict[Ticket, Request] = {}
        self.refused: list[Request] = []
        self.cut: list[Request] = []
        self.admission: Admission[Ticket] = Admission(
            clock=lambda: self.now, max_waiting=1000, wait_secs=inf, models=["m"], max_in_flight=30
        )

    @property
    def in_flight(self) -> list[Ticket]:
        return [ticket for ticket in self.of if ticket.stage is Stage.IN_FLIGHT]

    def due(self, ticket: Ticket) -> float:
        request = self.of[ticket]
        after = request.first_byte + (0.0 if ticket.repeatable else request.rest)
        return ticket.admitted_at + min(after, request.kills)

    def run(self) -> None:
        while self.to_come or len(self.in_flight) or self.up_at < inf:
            wake_at = self.admission.wake_at
            self.now = max(self.now, min(
                self.up_at,
                inf if wake_at is None else wake_at,
                self.to_come[0].comes if self.to_come else inf,
                *map(self.due, self.in_flight),
            ))  # fmt: skip
            self.step()

    def step(self) -> None:
        while self.to_come and self.to_come[0].comes <= self.now:
            ticket = Ticket("m", self.now, inf)
            self.of[ticket] = self.to_come.pop(0)
            self.admission.submit(ticket)
        if self.up_at <= self.now:
            self.up_at = inf
            self.admission.grant("m", f"e{self.deaths}", ADDRESS)
        self.admission.tick()
        for ticket in self.in_flight:
            if ticket.stage is not Stage.IN_FLIGHT or self.due(ticket) > self.now:
                continue
            if self.of[ticket].kills < inf:
                return self.die()
            if ticket.repeatable:
                self.admission.answered(ticket)
            if self.due(ticket) <= self.now:
                self.admission.leave(ticket, completed=True)

    def die(self) -> None:
        lease = self.admission.revoke("m", f"e{self.deaths}")
        assert lease is not None
        self.deaths += 1
        self.up_at = self.now + START_SECS
        for ticket in self.order.draw(st.permutations(self.in_flight)):
            if not self.admission.wait_again(ticket):
                (self.refused if ticket.repeatable else self.cut).append(self.of[ticket])
                self.admission.leave(ticket)


def judge(world: World, requests: list[Request]) -> tuple[int, int]:
    """Returns how many poisons there were and into how many levels of groups all go."""
    world.run()
    poisons = [id(request) for request in requests if request.kills < inf]
    assert sorted(map(id, world.refused)) == sorted(poisons), "each is refused, and nobody else"
    assert {ticket.stage for ticket in world.of} == {Stage.ENDED}, "nobody is left"
    event(f"{len(poisons)} poisons, {world.deaths} deaths")
    return len(poisons), ceil(log(max(len(requests), 2), GROUPS))


@settings(max_examples=300, deadline=None)
@given(requests(kills=FIRST_TRIAL_SECS - 0.1), st.data())
def test_with_few_deaths(sent: list[Request], order: st.DataObject) -> None:
    world = World(sent, order)
    poisons, levels = judge(world, sent)
    assert world.deaths <= poisons * (2 + levels)


@settings(max_examples=300, deadline=None)
@given(requests(kills=100.0), st.data())
def test_also_those_that_outlive_their_trials(sent: list[Request], order: st.DataObject) -> None:
    world = World(sent, order)
    poisons, levels = judge(world, sent)
    assert world.deaths <= poisons * (5 + levels)
