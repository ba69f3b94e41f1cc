"""Who may be sent away when, by policy. Times are seconds on the reducer's clock."""

from __future__ import annotations

import pytest

from llmux.config.schema import PolicyConfig, PolicyType
from llmux.core.policy import Resident, Waiting, policy_for


def config(kind: PolicyType, **changes: float) -> PolicyConfig:
    return PolicyConfig(policy_type=kind, min_active_secs=5.0, **changes)  # type: ignore[arg-type]


def resident(*, since: float = 0.0, in_flight: int = 1) -> Resident:
    return Resident("served", since, in_flight, since)


@pytest.mark.parametrize("kind", list(PolicyType))
def test_nobody_is_sent_away_before_its_minimum(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    target = Waiting("wanted", 100, -1000.0, 1.0)
    assert policy.earliest(target, resident(since=50.0)) >= 55.0


@pytest.mark.parametrize("kind", [PolicyType.COST_AWARE, PolicyType.TIME_SLICE])
def test_nobody_waits_longer_than_the_maximum_for_a_busy_model(kind: PolicyType) -> None:
    policy = policy_for(config(kind, max_wait_secs=15.0))
    target = Waiting("wanted", 1, 100.0, 60.0)
    assert policy.earliest(target, resident(since=0.0)) <= 115.0


def test_fifo_switches_as_soon_as_the_minimum_is_over() -> None:
    policy = policy_for(config(PolicyType.FIFO))
    assert policy.earliest(Waiting("wanted", 1, 100.0, 60.0), resident()) == 5.0


def test_cost_aware_lets_a_little_gather_when_the_switch_is_cheap() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, coalesce_window_ms=2000.0))
    assert policy.earliest(Waiting("wanted", 1, 100.0, 1.0), resident()) == 102.0


def test_cost_aware_switches_at_once_when_enough_wait() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, amortization_factor=0.5))
    assert policy.earliest(Waiting("wanted", 5, 100.0, 10.0), resident()) == 100.0
    assert policy.earliest(Waiting("wanted", 4, 100.0, 10.0), resident()) == 102.0


def test_cost_aware_serves_for_as_long_as_the_switch_takes() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, max_wait_secs=1000.0))
    assert policy.earliest(Waiting("wanted", 1, 100.0, 30.0), resident(since=90.0)) == 120.0


def test_cost_aware_without_amortization_is_fifo() -> None:
    policy = policy_for(config(PolicyType.COST_AWARE, amortization_factor=0.0))
    assert policy.earliest(Waiting("wanted", 1, 100.0, 30.0), resident(since=90.0)) == 100.0


def test_time_slice_takes_an_idle_model_at_once() -> None:
    policy = policy_for(config(PolicyType.TIME_SLICE))
    target = Waiting("wanted", 1, 100.0, 30.0)
    assert policy.earliest(target, resident(since=90.0, in_flight=0)) == 95.0


@pytest.mark.parametrize("kind", list(PolicyType))
def test_whoever_waited_longest_is_first(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    waiting = [Waiting("late", 9, 7.0), Waiting("early", 1, 3.0)]
    assert policy.order(waiting) == ["early", "late"]


@pytest.mark.parametrize("kind", list(PolicyType))
def test_idle_ones_go_before_busy_ones(kind: PolicyType) -> None:
    policy = policy_for(config(kind))
    busy = Resident("busy", 0.0, 2, 1.0)
    idle = Resident("idle", 0.0, 0, 9.0)
    older = Resident("older", 0.0, 0, 5.0)
    assert policy.victims([busy, idle, older]) == ["older", "idle", "busy"]
