"""Which model may be sent away when, by policy. Times are seconds on the reducer's clock."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest

from llmux.config.schema import PolicyConfig, PolicyType
from llmux.core.demand.usage import Usage
from llmux.core.policies.base import Policy, Resident, Waiting, turn_of
from llmux.core.policies.choose import policy_for
from llmux.core.policies.fair import cycle_of
from llmux.core.policies.plain import Plain

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


@pytest.mark.parametrize("kind", list(PolicyType))
def test_the_model_waited_for_longest_is_first(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    waiting = [Waiting("late", 9, 7.0), Waiting("early", 1, 3.0)]
    assert policy.order(waiting, 10.0) == ["early", "late"]


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


@pytest.mark.parametrize("kind", list(PolicyType))
def test_idle_models_leave_before_busy_ones(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    busy = Resident("busy", 0.0, 2, 1.0)
    idle = Resident("idle", 0.0, 0, 9.0)
    older = Resident("older", 0.0, 0, 5.0)
    assert policy.victims([busy, idle, older]) == ["older", "idle", "busy"]
