"""What switches cost at least: never above what a clairvoyant reaches, and not far below it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.sim.bound import lower_bound
from llmux.sim.costs import Costs, ModelCosts
from llmux.sim.switch_bound import PARTS, switching_bound
from llmux.sim.trace import Arrival

SWITCH = 8.0
COSTS = Costs(ModelCosts(start=20.0, wake=7.0, park=1.0))

arrivals = st.builds(
    Arrival, st.floats(0, 100), st.sampled_from("aabbc"), st.sampled_from([0.5, 2.0, 10.0, 30.0])
)
costs = st.builds(
    lambda wakes, park: Costs(
        models={
            name: ModelCosts(start=20.0, wake=wake, park=park)
            for name, wake in zip("abc", wakes, strict=True)
        }
    ),
    st.tuples(*[st.sampled_from([2.0, 5.0, 9.0, 20.0])] * 3),
    st.sampled_from([0.5, 1.0, 4.0]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(arrivals, min_size=2, max_size=6).map(sorted), costs)
def test_no_clairvoyant_is_below_it(trace: list[Arrival], dear: Costs) -> None:
    exact = lower_bound(trace, dear, places=99)
    assert exact.exact
    assert switching_bound(trace, dear) <= exact.mean_wait * len(trace) + 1e-6


def test_one_model_and_cheap_switches_need_not_wait() -> None:
    assert switching_bound([Arrival(at, "a", 5.0) for at in range(20)], COSTS) == 0
    far = [Arrival(100.0 * at, "ab"[at % 2], 5.0) for at in range(10)]
    assert switching_bound(far, COSTS) == 0


def test_models_in_turn_faster_than_switches_wait_for_them() -> None:
    """A request every 4 s, in turn: those of one model wait while the other is resident."""
    trace = [Arrival(4.0 * at, "ab"[at % 2], 0.0) for at in range(100)]
    bound = switching_bound(trace, COSTS)
    exact = [lower_bound(trace[:count], COSTS, 99).mean_wait * count for count in (4, 8)]
    assert 0 < switching_bound(trace[:8], COSTS) <= exact[1]
    assert bound >= 8 * exact[1], "it grows with the trace"


def test_a_drain_counts_as_well() -> None:
    """Answers of a minute: a model has to end what it began before the other comes."""
    short = [Arrival(at, "ab"[at > 50], 1.0) for at in range(0, 160, 2)]
    long = [Arrival(one.at, one.model, 60.0) for one in short]
    assert switching_bound(long, COSTS) > 3 * switching_bound(short, COSTS)


def test_a_trace_too_long_for_the_grid_has_no_bound() -> None:
    month = [Arrival(86_400.0 * at, "ab"[at % 2], 1.0) for at in range(30)]
    assert switching_bound(month, COSTS) == 0


@pytest.mark.parametrize("models", ["ab", "abc", "abcdef"])
def test_a_group_counts_as_one_model(models: str) -> None:
    trace = [Arrival(0.5 * at, models[at % len(models)], 1.0) for at in range(200)]
    grid = 1 - 2 / PARTS
    # either group is away for half the time at least, and for two switches each time
    assert switching_bound(trace, COSTS) >= grid * len(trace) / 2 * SWITCH / 2
