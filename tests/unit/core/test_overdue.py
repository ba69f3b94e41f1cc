"""The core's own deadline: an operation that never reports its end does not keep its model."""

from __future__ import annotations

import pytest
from core_harness import Core, model

from llmux.core.effects import SendCut
from llmux.core.events import OperationFinished, ParkAsked
from llmux.core.plans import Outcome
from llmux.core.records import Draining
from llmux.core.states import ModelState
from llmux.core.transaction import OVERDUE_SECS


def _starting() -> Core:
    core = Core(model("resting"), model("a"))
    core.demand("a", waiting=1)
    return core


def _parking() -> Core:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    return core


def _waking() -> Core:
    core = _parking()
    core.finish("a")
    core.finish("b")
    core.demand("b")
    core.demand("a", waiting=1)
    core.park("b")
    return core


@pytest.mark.parametrize("begin", [_starting, _parking, _waking])
def test_an_operation_without_an_end_is_given_up_and_its_engine_killed(begin: object) -> None:
    assert callable(begin)
    core: Core = begin()
    plan = core.running["a"]
    limit = plan.plan.deadline + OVERDUE_SECS
    assert core.state.wakeup is not None
    assert core.state.wakeup <= core.now + limit
    core.pass_time(limit - 1)
    assert core.at("a") is not ModelState.FAILED
    core.pass_time(1)
    assert core.at("a") is ModelState.FAILED
    failed = core.record("a").phase
    assert getattr(failed, "held", False), "its GPU is not given out before a kill was seen"
    assert "has not ended after" in getattr(failed, "message", "")
    core.happen(OperationFinished("a", plan.op, Outcome.UP))  # it comes after all
    assert core.at("a") is ModelState.FAILED
    core.pass_time(60)
    assert core.at("a") is ModelState.STOPPING
    core.finish("a")
    assert core.at("a") in (ModelState.FAILED, ModelState.STOPPED)
    assert not getattr(core.record("a").phase, "held", False)


def test_an_operation_without_an_end_is_a_failure_like_others() -> None:
    core = _starting()
    core.finish("a", Outcome.DOWN, "exit status 1")
    core.pass_time(600)
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.STARTING
    core.pass_time(core.running["a"].plan.deadline + OVERDUE_SECS)
    assert (core.at("a"), core.record("a").failures) == (ModelState.FAILED, 2)


def drain_limit(core: Core, name: str) -> float:
    """Seconds from the beginning of its drain to the cut."""
    draining = core.record(name).phase
    assert isinstance(draining, Draining)
    return draining.deadline - draining.since


def test_a_victim_of_a_cut_gets_one_turn_without() -> None:
    core = Core(model("a"), model("b"), drain_timeout_secs=5.0, request_timeout_secs=300.0)
    core.serve("a")

    def switch(leaves: str, comes: str, *, cut: bool) -> float:
        core.demand(leaves, in_flight=1)
        core.demand(comes, waiting=1)
        limit = drain_limit(core, leaves)
        if cut:
            core.pass_time(5)
            assert core.done(SendCut)
        core.park(leaves)
        core.finish(comes)
        core.demand(comes)
        return limit

    assert switch("a", "b", cut=True) == 5.0
    assert switch("b", "a", cut=False) == 5.0
    assert switch("a", "b", cut=False) == 300.0, "else they cut each other for ever"
    assert switch("b", "a", cut=False) == 5.0
    assert switch("a", "b", cut=False) == 5.0


def test_an_operator_who_parks_it_waits_no_longer_for_that() -> None:
    core = Core(model("a"), model("b"), drain_timeout_secs=5.0, request_timeout_secs=300.0)
    core.serve("a")
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    core.pass_time(5)
    core.park("a")
    core.finish("b")
    core.demand("b")
    core.demand("a", waiting=1)
    core.park("b")
    core.finish("a")
    core.demand("a", in_flight=1)
    assert core.record("a").cut
    core.happen(ParkAsked("a"))
    assert drain_limit(core, "a") == 5.0
