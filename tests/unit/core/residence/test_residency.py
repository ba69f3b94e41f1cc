"""What operators decide about residence: pins, never_evict, priority, idle timeouts, exclusive
groups, preloading."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from core_harness import FREEZE, WORKER, Core, config_of, model

from llmux.core.adopt import Observation, adopt
from llmux.core.effects import RunPlan
from llmux.core.events import (
    ConfigChanged,
    DemandChanged,
    EngineExited,
    KeepAliveSet,
    LoadAsked,
    ModeSet,
    ParkAsked,
    PinSet,
)
from llmux.core.plans import Outcome
from llmux.core.records import is_resident
from llmux.core.reducer import initial, reduce_all
from llmux.core.states import ModelState

# ---- pins and never_evict -----------------------------------------------------------------------


def test_a_pinned_model_makes_no_room_until_its_pin_ends() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.happen(PinSet("a", core.now + 60))
    core.demand("b", waiting=1)
    assert core.at("a") is ModelState.SERVING
    assert core.state.wakeup == core.now + 60
    core.pass_time(60)
    assert core.at("a") is ModelState.DRAINING
    assert core.state.pins == {}


def test_several_models_are_pinned_until_unpinned() -> None:
    core = Core(*(model(name, gpu_memory=0.45) for name in "abc"))
    for name in "ab":
        core.serve(name)
        core.happen(PinSet(name, math.inf))
    core.demand("c", waiting=1)
    core.pass_time(1e6)
    assert (core.at("a"), core.at("b")) == (ModelState.SERVING, ModelState.SERVING)
    core.happen(PinSet("b", None))
    assert (core.at("a"), core.at("b")) == (ModelState.SERVING, ModelState.DRAINING)


def test_a_pin_of_an_unknown_model_is_ignored_and_one_of_a_removed_model_ends() -> None:
    core = Core(model("a"), model("b"))
    core.happen(PinSet("ghost", math.inf))
    core.happen(PinSet("a", math.inf))
    assert core.state.pins == {"a": math.inf}
    core.happen(ConfigChanged(config_of(model("b"))))
    assert core.state.pins == {}


def test_a_model_that_is_never_evicted_makes_no_room() -> None:
    core = Core(model("a", never_evict=True, idle_timeout_secs=5), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.pass_time(1e6)
    assert core.at("a") is ModelState.SERVING


def test_the_start_of_a_kept_model_is_not_given_up_for_another() -> None:
    core = Core(model("a", never_evict=True), model("b"), give_up_start_secs=0.0)
    core.demand("a", waiting=1)
    core.demand("a")
    core.demand("b", waiting=1)
    assert core.at("a") is ModelState.STARTING


# ---- priority -----------------------------------------------------------------------------------


def test_priority_decides_who_comes_first_and_who_leaves_first() -> None:
    core = Core(
        model("low", gpu_memory=0.45),
        model("high", gpu_memory=0.45, priority=5),
        model("x", gpu_memory=0.45),
        model("y", gpu_memory=0.45, priority=1),
    )
    core.serve("high")
    core.now += 1
    core.serve("low")
    core.demand("x", waiting=9, age=9.0)
    core.demand("y", waiting=1)
    assert core.at("low") is ModelState.DRAINING, "though it was used later"
    core.park("low")
    assert core.plans() == ["start y"]


# ---- idle timeouts ------------------------------------------------------------------------------


def test_a_model_is_parked_after_its_idle_timeout() -> None:
    core = Core(model("a", idle_timeout_secs=30), model("b"), idle_timeout_secs=60.0)
    core.serve("a")
    assert core.state.wakeup == core.now + 30
    core.pass_time(20)
    core.demand("a", in_flight=1)
    core.pass_time(1000)
    assert core.at("a") is ModelState.SERVING, "in use"
    core.demand("a")
    core.pass_time(29)
    assert core.at("a") is ModelState.SERVING
    core.pass_time(1)
    core.park("a")
    assert core.at("a") is ModelState.PARKED
    core.serve("b")
    core.pass_time(60)
    assert core.at("b") is ModelState.DRAINING, "the policy's, without one of its own"


def test_zero_means_never_and_manual_mode_leaves_models_alone() -> None:
    core = Core(model("a", idle_timeout_secs=0), idle_timeout_secs=10.0)
    core.serve("a")
    core.pass_time(1e6)
    assert core.at("a") is ModelState.SERVING
    core = Core(model("a"), idle_timeout_secs=10.0)
    core.serve("a")
    core.happen(ModeSet(manual=True))
    core.pass_time(1e6)
    assert core.at("a") is ModelState.SERVING


def test_an_eviction_that_frees_nothing_is_not_applied_for_idleness() -> None:
    models = (model("a", eviction=FREEZE, gpus=(0,)), model("b", gpus=(1,)))
    core = Core(*models, gpu_count=2, idle_timeout_secs=10.0)
    core.serve("a")
    core.serve("b")
    core.pass_time(1e6)
    assert (core.at("a"), core.at("b")) == (ModelState.SERVING, ModelState.DRAINING)


@pytest.mark.parametrize(("seconds", "leaves_after"), [(5.0, 5), (0.0, 0), (math.inf, None)])
def test_a_request_may_say_for_how_long_its_model_stays(
    seconds: float, leaves_after: float | None
) -> None:
    core = Core(model("a"), idle_timeout_secs=60.0)
    core.serve("a")
    core.happen(KeepAliveSet("a", seconds))
    if leaves_after is None:
        core.pass_time(1e6)
        assert core.at("a") is ModelState.SERVING
        return
    core.pass_time(leaves_after)
    assert core.at("a") is ModelState.DRAINING


# ---- exclusive groups ---------------------------------------------------------------------------


def exclusive(*groups: tuple[str, ...], gpu_count: int = 1) -> Core:
    core = Core(*(model(name, gpu_memory=0.3, gpus=1) for name in "abc"), gpu_count=gpu_count)
    core.happen(ConfigChanged(replace(core.state.config, exclusive=groups)))
    return core


@pytest.mark.parametrize("gpu_count", [1, 2])
def test_of_an_exclusive_group_one_model_is_resident_at_a_time(gpu_count: int) -> None:
    core = exclusive(("a", "b"), gpu_count=gpu_count)
    core.serve("a")
    core.serve("c")
    core.demand("b", waiting=1)
    assert core.states() == {"a": "draining", "b": "stopped", "c": "serving"}
    core.drained("a")
    assert core.plans() == ["park a"]
    core.finish("a")
    assert core.plans() == ["start b"]


def test_two_of_a_group_that_are_waited_for_come_one_after_the_other() -> None:
    core = exclusive(("a", "b", "c"))
    core.demand("a", waiting=1, age=2.0)
    core.demand("b", waiting=1, age=1.0)
    assert core.states() == {"a": "starting", "b": "stopped", "c": "stopped"}
    core.finish("a")
    assert core.at("b") is ModelState.STOPPED
    core.demand("a")
    core.park("a")
    assert core.plans() == ["start b"]


def test_a_parked_one_that_dies_is_not_resident() -> None:
    core = exclusive(("a", "b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.park("a")
    core.finish("b")
    core.happen(EngineExited("a", "exit status 1"))
    assert core.at("a") is ModelState.STOPPING
    assert not is_resident(core.record("a"))


def test_a_parked_one_that_cannot_be_killed_is_not_resident_either() -> None:
    """Before, its next kill was a second resident of the group beside the one that had come."""
    core = exclusive(("a", "b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.park("a")
    core.finish("b")
    core.happen(EngineExited("a", "exit status 1"))
    core.finish("a", Outcome.STUCK)
    assert (core.at("a"), is_resident(core.record("a"))) == (ModelState.FAILED, False)
    core.happen(LoadAsked("a"))
    assert (core.at("a"), is_resident(core.record("a"))) == (ModelState.STOPPING, False)


def test_a_kept_model_keeps_its_group_away() -> None:
    core = exclusive(("a", "b"))
    core.serve("a")
    core.happen(PinSet("a", math.inf))
    core.demand("b", waiting=1)
    assert core.states() == {"a": "serving", "b": "stopped", "c": "stopped"}


# ---- preloading ---------------------------------------------------------------------------------


def test_models_to_be_preloaded_start_with_the_host_as_far_as_they_fit() -> None:
    models = (model("a", gpu_memory=0.6), model("b", gpu_memory=0.6), model("c", gpu_memory=0.3))
    config = replace(config_of(*models), preload=("a", "b", "c"))
    core = Core(*models)
    core.state, core.effects = adopt(
        initial(config, gpu_count=1, epoch_prefix="t"), [], [], core.now
    )
    core.running = {plan.model: plan for plan in core.done(RunPlan)}
    core.finish("a")
    assert core.plans() == ["start c"]
    core.finish("c")
    assert core.states() == {"a": "serving", "b": "stopped", "c": "serving"}
    assert core.state.wants == {}


def test_a_supervisor_that_finds_engines_preloads_nothing() -> None:
    config = replace(config_of(model("a"), model("b")), preload=("b",))
    seen = Observation("a", frozen=False, healthy=True, sleeping=False)
    state, _ = adopt(initial(config, gpu_count=1, epoch_prefix="t"), [seen], [], 5.0)
    assert state.wants == {}


def test_an_operator_may_still_load_what_is_exclusive() -> None:
    core = exclusive(("a", "b"))
    core.serve("a")
    core.happen(LoadAsked("b"))
    core.drained("a")
    core.finish("a")
    core.finish("b")
    assert core.states() == {"a": "parked", "b": "serving", "c": "stopped"}


def test_room_on_two_gpus_is_made_where_one_of_them_was_never_used() -> None:
    core = Core(model("narrow", gpus=(0,)), model("wide", gpus=(0, 1)), gpu_count=2)
    core.serve("narrow")
    core.demand("wide", waiting=1)
    assert core.at("narrow") is ModelState.DRAINING


def test_a_waiting_model_whose_residue_was_in_the_way_does_not_start_before_it_is_gone() -> None:
    """It is stopped for the one in front, and would fit on another GPU in the same decision."""
    residue = model("residue", gpus=1, gpu_memory_parked=0.2)
    core = Core(residue, model("first", gpus=(0,), gpu_memory=0.9), gpu_count=2)
    core.serve("residue")
    core.happen(ParkAsked("residue"))
    core.drained("residue")
    core.finish("residue")
    assert core.record("residue").gpus == (0,)
    together = [
        DemandChanged(WORKER, n, 1, core.now - n.count("f"), 0, 0) for n in ("first", "residue")
    ]
    core.state, _ = reduce_all(core.state, together, core.now)
    assert core.states() == {"residue": "stopping", "first": "stopped"}
