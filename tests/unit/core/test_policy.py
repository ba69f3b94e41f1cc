"""Which model may be sent away when, by policy. Times are seconds on the reducer's clock."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest

from llmux.config.schema import PolicyConfig, PolicyType
from llmux.core.demand.usage import UNUSED, Usage
from llmux.core.policies.base import (
    EULER,
    Policy,
    Resident,
    Waiting,
    drain_of,
    drained_in,
    turn_of,
)
from llmux.core.policies.choose import policy_for
from llmux.core.policies.cost_aware import CostAware
from llmux.core.policies.fair import DRAINS, OVERHEAD, TURN, Fair, cycle_of
from llmux.core.policies.fifo import Fifo
from llmux.core.policies.plain import Plain
from llmux.core.policies.time_slice import TimeSlice

NOW = 100.0


def config(kind: PolicyType, **changes: Any) -> PolicyConfig:
    return PolicyConfig(policy_type=kind, **({"min_active_secs": 5.0} | changes))


def resident(*, since: float = 0.0, in_flight: int = 1, **facts: Any) -> Resident:
    return Resident("served", since, in_flight, since, **facts)


def wanted(
    waiting: int = 1, since: float = NOW, cost: float = 1.0, *, service: float = 1.0
) -> Waiting:
    return Waiting("wanted", waiting, since, cost, Usage(work=service))


def earliest(policy: Policy, target: Waiting, victim: Resident, now: float = NOW) -> float:
    return policy.earliest(target, victim, [target], now)


@pytest.mark.parametrize("kind", list(PolicyType))
def test_an_idle_model_leaves_at_once(kind: PolicyType) -> None:
    policy = policy_for(config(kind, min_active_secs=50.0, coalesce_window_ms=0.0))
    idle = resident(since=NOW - 20, in_flight=0)
    assert earliest(policy, wanted(), idle) <= NOW


@pytest.mark.parametrize("kind", [k for k in PolicyType if k is not PolicyType.FAIR])
def test_a_busy_model_serves_its_minimum(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    assert earliest(policy, wanted(100, -1000.0), resident(since=50.0)) >= 55.0


@pytest.mark.parametrize("kind", list(PolicyType))
def test_requests_that_queue_for_a_place_are_served_before_their_model_leaves(
    kind: PolicyType,
) -> None:
    policy = policy_for(config(kind))
    full = resident(since=NOW - 10, in_flight=40, places=32)
    assert earliest(policy, wanted(cost=10.0), full) > NOW + 10


@pytest.mark.parametrize("kind", list(PolicyType))
def test_a_queue_that_never_ends_does_not_keep_a_model_for_ever(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    full = resident(since=NOW, in_flight=10_000, places=32, rate=1000.0)
    assert earliest(policy, wanted(cost=10.0), full) < NOW + 1000


def test_plain_would_keep_it() -> None:
    full = resident(since=NOW, in_flight=40, places=32)
    assert earliest(Plain(config(PolicyType.FAIR)), wanted(), full) == math.inf


def test_plain_serves_for_as_long_as_both_switches_take() -> None:
    plain = Plain(config(PolicyType.FAIR, max_wait_secs=1.0))
    assert earliest(plain, wanted(cost=10.0), resident(leave=5.0)) == NOW + 15.0


@pytest.mark.parametrize("kind", [PolicyType.COST_AWARE, PolicyType.TIME_SLICE, PolicyType.FAIR])
def test_no_request_waits_longer_than_the_maximum_for_a_busy_model(kind: PolicyType) -> None:
    policy = policy_for(config(kind, max_wait_secs=15.0))
    assert earliest(policy, wanted(cost=60.0), resident(since=0.0)) <= NOW + 15.0


def test_fifo_switches_as_soon_as_the_minimum_is_over() -> None:
    policy = policy_for(config(PolicyType.FIFO))
    assert earliest(policy, wanted(cost=60.0), resident()) == 5.0


def test_cost_aware_lets_a_little_gather_when_the_switch_is_cheap() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, coalesce_window_ms=2000.0))
    assert earliest(policy, wanted(), resident()) == 102.0


def test_cost_aware_switches_at_once_when_enough_wait() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, amortization_factor=0.5))
    assert earliest(policy, wanted(5, cost=10.0), resident()) == 100.0
    assert earliest(policy, wanted(4, cost=10.0), resident()) == 102.0


def test_cost_aware_serves_for_as_long_as_the_switch_takes() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, max_wait_secs=1000.0))
    assert earliest(policy, wanted(cost=30.0), resident(since=90.0)) == 120.0


def test_cost_aware_without_amortization_is_fifo() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, amortization_factor=0.0))
    assert earliest(policy, wanted(cost=30.0), resident(since=90.0)) == 100.0


def test_fair_stays_while_leaving_costs_more_than_it_saves() -> None:
    policy = policy_for(config(PolicyType.FAIR))
    busy = resident(since=NOW - 60, in_flight=10, service=3.0, back=10.0)
    assert earliest(policy, wanted(1, cost=10.0), busy) > NOW
    assert earliest(policy, wanted(200, cost=10.0), busy) <= NOW
    almost_idle = replace(busy, in_flight=1)
    assert earliest(policy, wanted(20, cost=10.0), almost_idle) <= NOW


def test_fair_serves_a_batch_although_others_have_waited_longer_than_the_maximum() -> None:
    """Where a cycle outlasts max_wait_secs, a model that came up has always overstayed by it."""
    policy = policy_for(config(PolicyType.FAIR, max_wait_secs=15.0))
    came = resident(since=NOW - 1, in_flight=10, service=3.0, back=2.0)
    others = [replace(wanted(20, NOW - 20 + n, 2.0, service=3.0), model=str(n)) for n in range(2)]
    assert policy.earliest(others[0], came, others, NOW) > NOW + 5
    almost_done = replace(came, in_flight=1)
    assert policy.earliest(others[0], almost_done, others, NOW) <= NOW


def test_fair_knows_that_all_that_wait_come_before_the_model_is_back() -> None:
    policy = policy_for(config(PolicyType.FAIR))
    busy = resident(since=NOW - 60, in_flight=3, service=3.0, back=2.0)
    one = wanted(35, NOW, 2.0, service=3.0)
    assert policy.earliest(one, busy, [one], NOW) <= NOW
    distant = replace(wanted(1, NOW, 60.0, service=30.0), model="distant")
    assert policy.earliest(one, busy, [one, distant], NOW) > NOW, "it is away for minutes"


def test_a_cycle_is_all_switches_and_turns_until_the_model_is_back() -> None:
    first = Waiting("first", 3, 0.0, cost=10.0, usage=Usage(NOW, 0.5, work=4.0), places=1)
    second = Waiting("second", 1, 5.0, cost=20.0)
    victim = resident(leave=2.0, back=5.0)
    one = cycle_of(victim, [first], 1.0, NOW)
    batch = 3 + 0.5 * (1.0 + 12.0)
    turn = turn_of(4.0, 1, batch)
    assert one.delayed == pytest.approx(batch)
    assert one.away == pytest.approx(1.0 + 12.0 + turn + 5.0)
    assert one.switching == pytest.approx(1.0 + 5.0 + 12.0 + first.drain)
    both = cycle_of(victim, [second, first], 1.0, NOW)
    assert both.delayed == pytest.approx(batch + 1)
    assert both.away == pytest.approx(one.away + 22.0 + second.turn)


def test_a_models_pace_is_its_answers_over_its_switch_and_its_turn() -> None:
    slow = Waiting("slow", 3, 0.0, cost=10.0, usage=Usage(NOW, 0.5, work=4.0), places=1)
    assert slow.pace == pytest.approx(3 / (10.0 + turn_of(4.0, 1, 3)))
    quick = Waiting("quick", 3, 0.0, cost=11.0, usage=Usage(NOW, 0.5, work=0.1), places=1)
    assert quick.pace > slow.pace
    assert replace(quick, waiting=0).pace == 0


@pytest.mark.parametrize(
    "policy",
    [*map(policy_for, map(config, PolicyType)), Plain(config(PolicyType.FAIR))],
    ids=lambda one: type(one).__name__,
)
def test_the_model_waited_for_longest_is_first(policy: Policy) -> None:
    waiting = [Waiting("late", 9, 7.0), Waiting("early", 1, 3.0)]
    assert policy.order(waiting, 10.0) == ["early", "late"]
    assert policy.order(waiting[::-1], 10.0) == ["early", "late"]
    ties = [Waiting(name, 1, 3.0) for name in "ba"]
    assert policy.order(ties, 10.0) == ["a", "b"]


def test_of_those_that_were_away_all_the_time_fair_takes_the_one_with_the_most_answers() -> None:
    policy = policy_for(config(PolicyType.FAIR))
    early = Waiting("early", 1, 3.0, away_since=0.0)
    crowd = Waiting("crowd", 50, 7.0, away_since=2.0)
    assert policy.order([early, crowd], 10.0) == ["crowd", "early"]
    served = replace(crowd, away_since=4.0)
    assert policy.order([early, served], 10.0) == ["early", "crowd"], "it had its turn"


@pytest.mark.parametrize("kind", list(PolicyType))
def test_twice_as_many_models_that_wait_cost_about_twice_the_work(kind: PolicyType) -> None:
    policy = policy_for(config(kind))

    def calls(count: int) -> int:
        waiting = [Waiting(f"m{n:03}", n % 7 + 1, float(n), away_since=0.0) for n in range(count)]
        made = 0

        def count_one(_frame: object, _event: str, _what: object) -> None:
            nonlocal made
            made += 1

        sys.setprofile(count_one)
        try:
            policy.order(waiting, 1000.0)
        finally:
            sys.setprofile(None)
        return made

    assert calls(400) < 3 * calls(200)


@pytest.mark.parametrize("kind", list(PolicyType))
def test_priority_goes_before_everything(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    low, high = Waiting("low", 9, 1.0), Waiting("high", 1, 9.0, priority=1)
    assert policy.order([low, high], 10.0) == ["high", "low"]
    busy = Resident("busy", 0.0, 2, 9.0)
    assert policy.victims([Resident("important", 0.0, 0, 0.0, priority=1), busy]) == [
        "busy",
        "important",
    ]


POLICIES: list[Policy] = [policy_for(config(kind)) for kind in PolicyType]
POLICIES.append(Plain(config(PolicyType.FAIR)))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: type(one).__name__)
def test_idle_models_leave_before_busy_ones(policy: Policy) -> None:
    busy = Resident("busy", 0.0, 2, 1.0)
    idle = Resident("idle", 0.0, 0, 9.0)
    older = Resident("older", 0.0, 0, 5.0)
    assert policy.victims([busy, idle, older]) == ["older", "idle", "busy"]
    ties = [Resident(name, 0.0, 0, 5.0) for name in "ba"]
    assert policy.victims(ties) == ["a", "b"]
    one = replace(busy, in_flight=1)
    assert policy.victims([one, idle]) == ["idle", "busy"], "one request is busy"


# ---- the figures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "places", "requests", "drain", "turn"),
    [
        (2.0, 4, 0, 0.0, 0.0),
        (2.0, 4, 1, 2 * (math.log(1.5) + EULER), 2 * (math.log(1.5) + EULER)),
        (2.0, 4, 4, 2 * (math.log(4.5) + EULER), 2 * (math.log(4.5) + EULER)),
        (2.0, 4, 6, 2 * (math.log(4.5) + EULER), 2 * 0.5 + 2 * (math.log(4.5) + EULER)),
        (2.0, 4, 12, 2 * (math.log(4.5) + EULER), 2 * 2 + 2 * (math.log(4.5) + EULER)),
    ],
)  # fmt: skip
def test_how_long_a_batch_takes_to_its_last_answer(
    service: float, places: int, requests: int, drain: float, turn: float
) -> None:
    assert (drain_of(service, places, requests), turn_of(service, places, requests)) == (
        drain,
        turn,
    )
    one = Waiting("a", requests, 0.0, 5.0, Usage(work=service), places)
    assert (one.service, one.drain, one.turn) == (service, drain, turn)
    assert one.pace == requests / (5.0 + turn)
    assert drained_in(2.0, 0.0) == 0.0


def test_what_is_said_of_a_model_by_itself() -> None:
    one = Waiting("a", 3, 1.0)
    assert one == Waiting("a", 3, 1.0, 0.0, UNUSED, 1024, 0, math.inf)
    assert Waiting("a", 0, 1.0).pace == 0.0
    there = Resident("a", 1.0, 3, 2.0)
    assert there == Resident("a", 1.0, 3, 2.0, 0.0, 0.0, 0.0, 1.0, 1024, 0)
    assert [replace(there, places=n).queued for n in (1, 2, 3, 4)] == [2, 1, 0, 0]


KEPT = {"since": 90.0, "leave": 3.0, "back": 4.0}


@pytest.mark.parametrize(
    ("policy", "target", "victim", "when"),
    [
        # an idle one: since the request came
        (Fifo, {}, {"in_flight": 0}, 95.0), (TimeSlice, {}, {"in_flight": 0}, 95.0),
        (Plain, {}, {"in_flight": 0}, 95.0), (Fair, {}, {"in_flight": 0}, 95.0),
        (CostAware, {"waiting": 50}, {"in_flight": 0}, 95.0),
        (CostAware, {}, {"in_flight": 0}, 102.0),  # as long as the switch takes: 2 + 3, from 90, or
        # its window, or to the limit
        (CostAware, {"cost": 9.0}, {"in_flight": 0}, 102.0),
        (CostAware, {"cost": 90.0}, {"in_flight": 0}, 115.0),
        # a busy one: its least time
        (Fifo, {}, {}, 95.0), (Fifo, {}, {"since": 99.0}, 104.0),
        (TimeSlice, {}, {}, 115.0), (TimeSlice, {"oldest": 50.0}, {}, 95.0),
        (Plain, {}, {}, 115.0), (Plain, {"cost": 30.0}, {}, 128.0),
        # while requests queue there: eight times the switch, which is 2 + 3
        (Fifo, {}, {"in_flight": 9, "places": 8}, 130.0),
        (Fifo, {}, {"in_flight": 8, "places": 8}, 95.0),
        (Fifo, {"cost": -2.9}, {"in_flight": 9, "places": 8}, 95.0),
        (TimeSlice, {}, {"in_flight": 9, "places": 8}, 130.0),
        (Plain, {}, {"in_flight": 9, "places": 8}, math.inf),
        # enough that wait: half of the seconds of the switch, rounded up
        (CostAware, {"waiting": 3}, {}, 95.0), (CostAware, {"waiting": 2}, {}, 102.0),
        (CostAware, {"waiting": 3}, {"since": 99.0}, 104.0),
        (CostAware, {"waiting": 2, "cost": 0.0}, {}, 95.0),
        (CostAware, {"waiting": 9, "cost": -2.0}, {}, 102.0),  # one is no crowd
    ],
)  # fmt: skip
def test_when_a_model_may_be_sent_away(
    policy: Any, target: dict[str, Any], victim: dict[str, Any], when: float
) -> None:
    facts = {"waiting": 1, "oldest": 95.0, "cost": 2.0} | target
    wants = Waiting("wanted", facts["waiting"], facts["oldest"], facts["cost"])
    settings = PolicyConfig(
        min_active_secs=5.0, max_wait_secs=20.0, coalesce_window_ms=7000.0, amortization_factor=0.5
    )
    served = resident(**(KEPT | victim))
    assert policy(settings).earliest(wants, served, [wants], NOW) == when


def test_fair_by_its_figures() -> None:
    policy = Fair(PolicyConfig(max_wait_secs=20.0))
    one = Waiting("one", 2, 95.0, 2.0, Usage(work=3.0))
    busy = resident(since=90.0, in_flight=4, leave=3.0, back=4.0, service=3.0, places=8)
    drain = drained_in(3.0, 4)
    late = max(95.0 + 20.0, 90.0 + TURN * 7.0 + DRAINS * drain)
    assert policy.earliest(one, busy, [one], NOW) == late == 115.0
    came = replace(busy, serving_since=99.0)
    few = Fair(PolicyConfig(max_wait_secs=1.0))
    assert few.earliest(one, came, [one], NOW) == 99.0 + TURN * 7.0 + DRAINS * drain
    full = replace(came, in_flight=9)
    cycle = cycle_of(full, [one], drained_in(3.0, 8), NOW)
    assert few.earliest(one, full, [one], NOW) == 99.0 + OVERHEAD * cycle.switching
    first = replace(one, oldest_since=50.0)
    assert policy.earliest(one, replace(busy, in_flight=0), [one, first], NOW) == 50.0
    # what it delays by staying open is one more than those in flight
    last, crowd = resident(since=90.0, in_flight=1), replace(one, waiting=200)
    two = Waiting("two", 2, 95.0)
    assert policy.earliest(two, last, [two], NOW) == 115.0
    assert policy.earliest(crowd, last, [crowd], NOW) == 95.0


def test_fair_weighs_only_those_that_were_away_since_before_the_first_one_came() -> None:
    policy = policy_for(config(PolicyType.FAIR))

    def one(name: str, waiting: int, oldest: float, away: float) -> Waiting:
        return Waiting(name, waiting, oldest, away_since=away)

    a, b, c = one("a", 1, 3.0, 0.0), one("b", 50, 7.0, 3.0), one("c", 90, 8.0, 7.5)
    assert policy.order([c, b, a], 10.0) == ["b", "a", "c"], "b since exactly then; c was there"
    later = replace(b, away_since=3.1)
    assert policy.order([a, later, c], 10.0) == ["a", "b", "c"]
    assert policy.order([a, later, replace(c, away_since=7.0)], 10.0) == ["a", "c", "b"]
    d = one("d", 2, 9.0, 1.0)
    assert policy.order([a, b, c, d], 10.0) == ["b", "d", "a", "c"]
    high = replace(a, priority=1, model="high", oldest_since=9.5)
    assert policy.order([a, b, c, d, high], 10.0) == ["high", "b", "d", "a", "c"]
    assert policy.order([], 10.0) == []
