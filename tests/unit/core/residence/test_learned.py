"""What the core learns from what it sees: memory, and what switches and answers take."""

from __future__ import annotations

import pytest
from core_harness import OFFLOAD, STOP, WORKER, Core, config_of, model

from llmux.config.schema import Eviction
from llmux.core.demand.usage import COST_WEIGHT, OUTLIER, Usage, averaged
from llmux.core.effects import SwitchFinished
from llmux.core.events import (
    AwakeSeen,
    ConfigChanged,
    DemandChanged,
    ParkAsked,
    ResidueSeen,
    WorkerLeft,
)
from llmux.core.plans import Outcome
from llmux.core.records import coming, leaving


def test_what_a_model_is_seen_to_hold_is_learned_from_its_own_operation() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    op = core.running["a"].op
    core.happen(ResidueSeen("a", op, 0.1))
    core.happen(AwakeSeen("a", op, 0.8))
    assert (core.record("a").residue, core.record("a").awake) == (0.1, 0.8)
    core.happen(ResidueSeen("a", op + 7, 0.3))
    core.happen(AwakeSeen("a", op + 7, 0.3))
    core.happen(ResidueSeen("nosuch", op, 0.3))
    assert (core.record("a").residue, core.record("a").awake) == (0.1, 0.8)


def test_a_switch_says_what_it_was_and_what_took_how_long() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    (cold,) = switch(core, "a", "b", drain=1, park=2, come=4)
    (woken,) = switch(core, "b", "a", drain=10, park=20, come=40)
    assert (cold.cold, woken.cold) == (True, False)
    assert [
        (
            one.drained_at - one.decided_at,
            one.room_at - one.drained_at,
            one.serving_at - one.room_at,
        )
        for one in (cold, woken)
    ] == [(1, 2, 4), (10, 20, 40)]
    way = f"park by {OFFLOAD}"
    assert {
        "park": core.state.costs["a", way],
        "cold": core.state.costs["b", coming(None)],
        "wake": core.state.costs["a", coming(OFFLOAD)],
    } == {"park": 2, "cold": 4, "wake": 40}


def switch(
    core: Core, leaves: str, comes: str, *, drain: float, park: float, come: float
) -> list[SwitchFinished]:
    core.demand(leaves, in_flight=1)
    core.demand(comes, waiting=1)
    core.now += drain
    core.drained(leaves)
    core.now += park
    core.finish(leaves)
    core.now += come
    core.finish(comes)
    return core.done(SwitchFinished)


def test_an_answer_counts_once_for_how_long_answers_take() -> None:
    core = Core(model("a"))
    core.serve("a")
    before = core.state.usage["a"].done
    for completed in (3, 5, 5):
        core.happen(DemandChanged(WORKER, "a", 0, None, 0, 0, completed))
    assert core.state.usage["a"].done == before + 5


def test_nothing_is_learned_of_models_that_there_are_not() -> None:
    """A client may ask for any name."""
    core = Core(model("a", gpu_memory=0.4), model("b", gpu_memory=0.4))
    for name in ("a", "b"):
        core.serve(name)
    for name in ("ghost", "gone"):
        core.demand(name, waiting=3)
        core.demand(name)
    assert set(core.state.usage) == {"a", "b"}
    core.demand("b", in_flight=1)
    core.happen(ConfigChanged(config_of(model("a", gpu_memory=0.4))))
    core.drained("b")
    core.finish("b")
    core.demand("b", waiting=1)
    assert set(core.state.usage) == set(core.state.models) == {"a"}
    core.happen(WorkerLeft(WORKER))
    assert set(core.state.usage) == {"a"}


@pytest.mark.parametrize(
    ("way", "outcome", "learned"),
    [
        (STOP, Outcome.DOWN, True), (OFFLOAD, Outcome.PARKED, True), (OFFLOAD, Outcome.DOWN, False),
        (STOP, Outcome.STUCK, False), (OFFLOAD, Outcome.STUCK, False),
    ],
)  # fmt: skip
def test_what_leaving_takes_is_learned_where_it_went_as_it_was_to(
    way: Eviction, outcome: Outcome, learned: bool
) -> None:
    """A park that failed says nothing of the next one."""
    core = Core(model("a", eviction=way))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.drained("a")
    core.pass_time(7)
    core.finish("a", outcome)
    assert core.state.costs.get(("a", leaving(way))) == (7 if learned else None)


@pytest.mark.parametrize("demand", [{"waiting": 1}, {"in_flight": 1}])
def test_a_model_is_in_use_when_a_request_comes_and_when_the_last_one_ends(
    demand: dict[str, int],
) -> None:
    core = Core(model("a"))
    core.serve("a")
    for seconds in (10, 20):
        core.now += seconds
        core.demand("a", **demand)
        assert core.record("a").last_active == core.now
        core.now += seconds
        core.demand("a")
    assert core.record("a").last_active == (core.now if "in_flight" in demand else core.now - 20)
    core.now += 30
    core.demand("a")
    assert core.record("a").last_active < core.now, "nothing came and nothing ended"


def test_requests_that_come_within_a_second_are_no_work_of_a_second() -> None:
    usage = Usage(at=10.0, work=3.0, done=3.0, in_flight=4)
    at_once = usage.after(10.0, arrived=1, completed=0, in_flight=5, places=32)
    assert at_once.work == 3.0
    later = at_once.after(10.5, arrived=0, completed=5, in_flight=0, places=32)
    assert later.work == pytest.approx(3.0 + 5 * 0.5, rel=0.01)
    assert later.service == pytest.approx(5.5 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "counts_as"), [(10.0, 10.0), (1000.0, 10.0 * OUTLIER), (0.001, 10.0 / OUTLIER)]
)
def test_one_strange_sample_does_not_spoil_an_average(seconds: float, counts_as: float) -> None:
    assert averaged(None, seconds) == seconds
    assert averaged(10.0, seconds) == pytest.approx(10.0 + COST_WEIGHT * (counts_as - 10.0))
