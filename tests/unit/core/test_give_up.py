"""A start can be given up: by an operator, a reload, or when only others wait for the room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_harness import OFFLOAD, Core, config_of, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import OrderAnswered, Verdict
from llmux.core.events import ConfigChanged, EngineExited, LoadAsked, OperationFinished, ParkAsked
from llmux.core.plans import Outcome, stop_plan
from llmux.core.records import Parked
from llmux.core.states import ModelState
from llmux.errors import Reason

STOP = Eviction(Weights.RETAIN, Process.STOP)


def starting() -> Core:
    """a is being started for one request; b waits for nothing yet."""
    core = Core(model("a"), model("b"), give_up_start_secs=10.0)
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.STARTING
    return core


def test_unload_ends_a_start_and_refuses_what_waits_for_it() -> None:
    core = starting()
    former = core.running["a"]
    core.happen(ParkAsked("a", STOP, 7))
    assert [answer.verdict for answer in core.done(OrderAnswered)] == [Verdict.ACCEPTED]
    assert core.plans() == ["stop a"]
    assert core.running["a"].plan == stop_plan(core.record("a").config, grace=False), "it may hang"
    assert core.refused() == [("a", Reason.START_FAILED)]
    assert core.at("a") is ModelState.STOPPING
    core.happen(OperationFinished("a", former.op, Outcome.UP))  # it was ready at the last moment
    assert core.at("a") is ModelState.STOPPING
    core.finish("a")
    assert core.at("a") is ModelState.STOPPED
    assert core.record("a").failures == 0


def test_a_reload_that_removes_the_model_ends_its_start() -> None:
    core = starting()
    config = config_of(model("b"))
    core.happen(ConfigChanged(config))
    assert core.plans() == ["stop a"]
    core.finish("a")
    assert set(core.state.models) == {"b"}


def test_a_reload_forgets_a_model_that_failed_but_not_one_that_cannot_be_killed() -> None:
    failed, held = starting(), starting()
    failed.finish("a", Outcome.DOWN, "exit status 1")
    held.finish("a", Outcome.STUCK, "state D")
    for core in (failed, held):
        assert core.at("a") is ModelState.FAILED
        core.happen(ConfigChanged(config_of(model("b"))))
    assert set(failed.state.models) == {"b"}
    assert set(held.state.models) == {"a", "b"}, "it holds its GPU"


def test_sleep_lets_a_start_end_and_parks_then() -> None:
    core = starting()
    core.happen(ParkAsked("a"))
    assert core.at("a") is ModelState.STARTING


def test_a_start_that_only_blocks_others_is_given_up() -> None:
    core = starting()
    core.demand("a")  # the client left
    assert core.at("a") is ModelState.STARTING, "nothing else wants the room"
    core.demand("b", waiting=1)
    assert core.plans() == ["stop a"]
    core.finish("a")
    assert core.plans() == ["start b"]


def test_a_start_that_is_waited_for_is_not_given_up_for_others() -> None:
    core = starting()
    core.demand("b", waiting=1)
    assert core.at("a") is ModelState.STARTING
    core.demand("a")
    assert core.at("a") is ModelState.STOPPING


def test_an_operator_s_load_is_not_given_up() -> None:
    core = Core(model("a"), model("b"))
    core.happen(LoadAsked("a"))
    core.demand("b", waiting=1)
    assert core.at("a") is ModelState.STARTING


@pytest.mark.parametrize(("elapsed", "waits"), [(10.0, False), (55.0, True), (69.0, True)])
def test_a_start_that_is_nearly_done_gets_some_seconds(elapsed: float, waits: bool) -> None:
    core = starting()
    core.now += 60  # what it usually takes
    core.finish("a")
    core.demand("a")
    core.happen(ParkAsked("a", STOP))
    core.park("a")
    core.demand("a", waiting=1)
    core.demand("a")
    core.now += elapsed
    core.demand("b", waiting=1)
    assert (core.at("a") is ModelState.STARTING) is waits
    if waits:
        core.pass_time(70.0 - elapsed)
        assert core.at("a") is ModelState.STOPPING, "it takes longer than it should"


def waking(wake_secs: float | None = None) -> Core:
    """a is being woken for one request, which usually takes ``wake_secs``; b waits for nothing."""
    core = Core(model("a"), model("b"), give_up_start_secs=10.0)
    core.put("a", phase=Parked(OFFLOAD, core.now), gpus=(0,))
    if wake_secs is not None:
        core.state = replace(core.state, costs={("a", f"wake from {OFFLOAD}"): wake_secs})
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.WAKING
    return core


@pytest.mark.parametrize("order", ["unload", "reload"])
def test_a_wake_that_hangs_is_ended_by_order(order: str) -> None:
    core = waking()
    former = core.running["a"]
    core.happen(
        ParkAsked("a", STOP, 7) if order == "unload" else ConfigChanged(config_of(model("b")))
    )
    assert core.plans() == ["stop a"]
    assert core.running["a"].plan == stop_plan(core.record("a").config, grace=False)
    assert [model for model, _ in core.refused()] == ["a"]
    core.happen(OperationFinished("a", former.op, Outcome.UP))  # it was up at the last moment
    assert core.at("a") is ModelState.STOPPING
    core.demand("b", waiting=1)
    core.demand("a")
    core.finish("a")
    assert core.plans() == ["start b"]
    assert order == "reload" or core.record("a").failures == 0


def test_sleep_lets_a_wake_end_and_parks_then() -> None:
    core = waking()
    core.happen(ParkAsked("a", OFFLOAD))
    assert core.at("a") is ModelState.WAKING
    assert core.record("a").park_request == OFFLOAD


@pytest.mark.parametrize(("usual", "ends"), [(2.0, 12.0), (30.0, 40.0), (None, 20.0)])
def test_a_wake_that_only_blocks_others_ends_once_it_takes_too_long(
    usual: float | None, ends: float
) -> None:
    core = waking(usual)
    core.demand("a")  # the client left
    core.demand("b", waiting=1)
    core.pass_time(ends - 0.5)
    assert core.at("a") is ModelState.WAKING, "its end would cost the parked state"
    core.pass_time(0.5)
    assert core.plans() == ["stop a"]
    core.finish("a")
    assert core.plans() == ["start b"]


@pytest.mark.parametrize("wanted", ["request", "order", "nobody else"])
def test_a_wake_that_is_waited_for_or_blocks_nobody_goes_on(wanted: str) -> None:
    core = waking(2.0)
    if wanted == "order":
        core.happen(LoadAsked("a"))
    if wanted != "request":
        core.demand("a")
    if wanted != "nobody else":
        core.demand("b", waiting=1)
    core.pass_time(60.0)
    assert core.at("a") is ModelState.WAKING


def test_room_for_both_gives_nothing_up() -> None:
    core = Core(model("a", gpu_memory=0.4), model("b", gpu_memory=0.4))
    core.demand("a", waiting=1)
    core.demand("a")
    core.demand("b", waiting=1)
    assert core.at("a") is ModelState.STARTING


def test_a_healthy_engine_that_died_once_is_started_again_at_once() -> None:
    core = Core(model("a"))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.happen(EngineExited("a", "killed by SIGKILL"))
    core.demand("a", waiting=1)
    core.finish("a")
    assert core.refused() == []
    assert core.plans() == ["start a"]
