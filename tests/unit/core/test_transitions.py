"""One memory transition per GPU at a time: vLLM looks at the whole device while it moves memory."""

from __future__ import annotations

from typing import Any

import pytest
from core_harness import FREEZE, OFFLOAD, STOP, WORKER, Core, model

from llmux.core.effects import SendCut
from llmux.core.events import EngineExited, LoadAsked, ParkAsked
from llmux.core.plans import Outcome
from llmux.core.records import Starting, Stopped
from llmux.core.states import ModelState


def crowd(*names: str, **settings: Any) -> Core:
    """Models that are resident together."""
    core = Core(*(model(name, gpu_memory=0.3, **settings) for name in (*names, "new")))
    for name in names:
        core.serve(name)
    return core


def test_two_models_with_room_start_one_after_the_other() -> None:
    core = Core(model("a", gpu_memory=0.4), model("b", gpu_memory=0.4))
    core.demand("a", waiting=1)
    core.demand("b", waiting=1)
    assert core.states() == {"a": "starting", "b": "stopped"}
    core.finish("a")
    assert core.states() == {"a": "serving", "b": "starting"}


def test_a_model_that_is_up_serves_while_another_starts() -> None:
    core = crowd("a")
    core.demand("new", waiting=1)
    core.demand("a", in_flight=1)
    assert core.states() == {"a": "serving", "new": "starting"}


def test_a_wake_waits_for_a_start_and_a_thaw_does_not() -> None:
    for how, then in ((OFFLOAD, ModelState.PARKED), (FREEZE, ModelState.WAKING)):
        core = crowd("a", eviction=how)
        core.happen(ParkAsked("a"))
        core.park("a")
        core.demand("new", waiting=1)
        core.demand("a", waiting=1)
        assert core.at("a") is then
        core.finish("new")
        assert core.at("a") is ModelState.WAKING


def test_a_park_waits_for_a_start_and_keeps_its_requests_meanwhile() -> None:
    core = crowd("a")
    core.demand("a", in_flight=1)
    core.demand("new", waiting=1)
    core.happen(ParkAsked("a"))
    core.pass_time(1000)
    assert core.done(SendCut) == [], "past its deadline, but a cut would gain nothing"
    core.drained("a")
    assert core.at("a") is ModelState.DRAINING
    core.finish("new")
    assert core.at("a") is ModelState.PARKING


def test_a_freeze_does_not_wait() -> None:
    core = crowd("a", eviction=FREEZE)
    core.demand("new", waiting=1)
    core.happen(ParkAsked("a"))
    core.drained("a")
    assert core.at("a") is ModelState.PARKING


def test_an_operator_s_stop_of_a_parked_model_waits_too() -> None:
    core = crowd("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("new", waiting=1)
    core.happen(ParkAsked("a", STOP))
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.PARKED
    core.finish("new")
    assert core.plans() == ["stop a"]


def test_a_load_takes_such_a_stop_back() -> None:
    core = crowd("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("new", waiting=1)
    core.happen(ParkAsked("a", STOP))
    core.happen(LoadAsked("a"))
    core.finish("new")
    assert core.plans() == ["wake a"]


def test_models_that_leave_do_so_one_after_the_other_and_before_any_comes() -> None:
    core = Core(model("a", gpu_memory=0.3), model("b", gpu_memory=0.3), model("big"))
    core.serve("a")
    core.serve("b")
    core.demand("big", waiting=1)
    core.drained("a")
    core.drained("b")
    assert core.states() == {"a": "parking", "b": "draining", "big": "stopped"}
    core.finish("a")
    assert core.states() == {"a": "parked", "b": "parking", "big": "stopped"}
    core.finish("b")
    assert core.at("big") is ModelState.STARTING


def test_what_died_is_cleaned_up_at_once_and_starts_wait_for_it() -> None:
    core = crowd("a", "b")
    core.demand("new", waiting=1)
    core.happen(EngineExited("a", "exit status 1"))
    assert core.plans() == ["stop a"]
    core.finish("new")
    core.happen(EngineExited("b", "exit status 1"))
    core.demand("b", waiting=1)
    core.finish("b")
    assert core.at("b") is ModelState.STOPPED
    core.finish("a")
    assert core.plans() == ["start b"]


def test_a_cold_start_after_a_failed_wake_waits_for_a_neighbour_s_end() -> None:
    core = crowd("a", "b")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.WAKING
    core.happen(EngineExited("b", "exit status 1"))
    core.finish("a", Outcome.DOWN, "500")
    assert core.record("a").phase == Stopped(core.now, "wake failed: 500")
    assert core.refused() == []
    core.finish("b")
    assert core.plans() == ["start a"]


def test_a_cold_start_after_a_failed_wake_waits_for_nothing_on_other_gpus() -> None:
    core = Core(model("a", gpus=(0,)), model("b", gpus=(1,)), gpu_count=2)
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.WAKING
    core.demand("b", waiting=1)
    assert core.at("b") is ModelState.STARTING
    core.finish("a", Outcome.DOWN, "500")
    assert core.plans() == ["start a"]
    assert core.record("a").phase == Starting(core.running["a"].op, core.now, "wake failed: 500")


@pytest.mark.parametrize("behind", ["one", "other"])
def test_a_wide_model_s_turn_comes_before_those_behind_it(behind: str) -> None:
    """Else models on one GPU could keep one or the other of its GPUs busy for ever."""
    core = Core(
        model("one", gpu_memory=0.2, gpus=(0,)),
        model("other", gpu_memory=0.2, gpus=(1,)),
        model("wide", gpu_memory=0.2, gpus=2),
        model("late", gpu_memory=0.2, gpus=(0 if behind == "one" else 1,)),
        gpu_count=2,
    )
    core.demand("one", waiting=1, age=9)
    core.demand("other", waiting=1, age=9)
    core.demand("wide", waiting=1, age=5)
    core.demand("late", waiting=1)
    core.finish(behind)
    assert core.plans() == [], "its GPU is quiet, but wide comes next there"
    core.finish("other" if behind == "one" else "one")
    assert core.plans() == ["start wide"]


def test_gpus_are_independent() -> None:
    core = Core(model("a", gpus=(0,)), model("b", gpus=(1,)), gpu_count=2)
    core.demand("a", waiting=1)
    core.demand("b", waiting=1)
    assert core.states() == {"a": "starting", "b": "starting"}


def test_no_worker_holds_the_epoch_of_an_engine_that_died() -> None:
    core = Core(model("a"))
    core.serve("a")
    assert core.state.workers[WORKER].holds == {"a": core.record("a").epoch}
    core.happen(EngineExited("a", "exit status 1"))
    assert core.state.workers[WORKER].holds == {}
