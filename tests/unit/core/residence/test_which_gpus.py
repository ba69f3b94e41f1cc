"""Where a model is placed on a host of several GPUs: which models leave for it, whose place it
takes, beside what it lives, and when a parked engine is given up to start elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
from core_harness import CHECKPOINT, STOP, Core, model

from llmux.config.schema import ModelConfig
from llmux.core.events import ParkAsked, PinSet
from llmux.core.placement.prices import Absent
from llmux.core.states import ModelState

START_SECS = 60.0


def anywhere(name: str, share: float = 0.9, **settings: Any) -> ModelConfig:
    return model(name, gpus=1, gpu_memory=share, gpu_memory_parked=0.01, **settings)


def come_up(core: Core, name: str, seconds: float = 0.0) -> None:
    """Room is there; one request comes, and is answered at once."""
    core.demand(name, waiting=1)
    core.pass_time(seconds)
    core.finish(name)
    core.demand(name)


def use(core: Core, name: str, times: int = 1) -> None:
    for _ in range(times):
        core.demand(name, in_flight=1)
        core.demand(name)


# ---- prices -------------------------------------------------------------------------------------


def test_a_place_is_lost_to_those_that_fitted_before_and_do_not_after() -> None:
    absent = Absent([(0.9, 5.0), (0.4, 1.0), (0.2, 0.5)])
    assert absent.displaced(free=1.0, taken=0.4, own=1.0) == 5, "itself does not count"
    assert absent.displaced(free=1.0, taken=0.05, own=0.0) == 0
    assert absent.displaced(free=0.5, taken=0.4, own=1.0) == 0.5
    assert absent.displaced(free=0.1, taken=0.1, own=0.0) == 0


# ---- which GPU ----------------------------------------------------------------------------------


def test_models_asked_for_within_the_same_time_are_not_each_others_victims() -> None:
    """All idle: what was in use beside the waiting model stays, whichever GPU it is on."""
    for first, second in (("friend", "former"), ("former", "friend")):
        core = Core(anywhere(first), anywhere(second), anywhere("next"), gpu_count=2)
        come_up(core, first)
        come_up(core, second)
        core.pass_time(100)
        use(core, "friend")
        core.demand("next", waiting=1)
        assert core.at("former") is ModelState.DRAINING, (first, second)
        assert core.at("friend") is ModelState.SERVING


def test_the_place_of_a_large_model_in_use_is_kept_free() -> None:
    """Its requests come every minute: two small ones that start meanwhile share a GPU."""
    core = Core(
        anywhere("large", idle_timeout_secs=20.0, eviction=STOP),
        anywhere("a", 0.4),
        anywhere("b", 0.4),
        gpu_count=2,
    )
    come_up(core, "large", START_SECS)
    core.pass_time(30)
    core.drained("large")
    core.finish("large")
    assert core.at("large") is ModelState.STOPPED
    come_up(core, "a")
    come_up(core, "b")
    assert core.record("a").gpus == core.record("b").gpus
    core.demand("large", waiting=1)
    assert core.plans() == ["start large"]


def test_at_equal_load_a_model_lives_beside_what_was_in_use_last() -> None:
    core = Core(
        model("former", gpus=(0,), gpu_memory=0.4),
        model("friend", gpus=(1,), gpu_memory=0.4),
        anywhere("next", 0.4),
        gpu_count=2,
    )
    core.serve("former")
    core.pass_time(100)
    core.serve("friend")
    core.demand("next", waiting=1)
    assert core.record("next").gpus == (1,)


# ---- move or wait -------------------------------------------------------------------------------


def crossed(small: ModelConfig | None = None, extra: ModelConfig | None = None) -> Core:
    """``a`` is parked on GPU 0, where ``large`` serves; beside ``b`` on GPU 1 it would fit."""
    core = Core(
        small or anywhere("a", 0.4),
        model("b", gpus=(1,), gpu_memory=0.4),
        model("large", gpus=(0,), gpu_memory=0.9),
        *([extra] if extra else []),
        gpu_count=2,
    )
    come_up(core, "a", START_SECS)
    assert core.record("a").gpus == (0,)
    come_up(core, "b")
    core.demand("large", waiting=1)
    core.drained("a")
    core.pass_time(3)
    core.finish("a")
    core.pass_time(3)
    core.finish("large")
    core.demand("large")
    return core


def switch(core: Core, name: str, victim: str, seconds: float) -> None:
    """A request wakes the model after so long; the other one makes room for it, idle."""
    core.demand(name, waiting=1)
    assert core.at(victim) is ModelState.DRAINING
    core.drained(victim)
    core.finish(victim)
    core.pass_time(seconds)
    core.finish(name)
    core.demand(name)


def test_a_parked_engine_moves_when_its_returns_have_taken_as_long_as_a_start() -> None:
    """Two halves free on two GPUs do not serve a whole one: its victim moves to the other half."""
    core = crossed()
    for _ in range(2):
        switch(core, "a", "large", START_SECS / 2)
        switch(core, "large", "a", 1)
    core.demand("a", waiting=1)
    assert core.plans() == ["stop a"]
    assert core.at("large") is ModelState.SERVING
    core.finish("a")
    assert core.plans() == ["start a"]
    assert core.record("a").gpus == (1,)
    core.finish("a")
    assert core.states() == {"a": "serving", "b": "serving", "large": "serving"}
    assert core.record("a").switched_secs == 0


def test_a_parked_engine_does_not_move_where_another_in_use_lives() -> None:
    """It would be sent away from there as well."""
    core = crossed(extra=model("other", gpus=(1,), gpu_memory=0.5))
    core.serve("other")
    core.happen(ParkAsked("other"))
    core.park("other")
    for _ in range(3):
        switch(core, "a", "large", START_SECS / 2)
        switch(core, "large", "a", 1)
    core.demand("a", waiting=1)
    assert core.at("large") is ModelState.DRAINING


def test_a_parked_engine_does_not_wait_for_a_pinned_one_beside_an_empty_place() -> None:
    core = crossed()
    core.happen(PinSet("large", math.inf))
    core.pass_time(1000)
    core.demand("a", waiting=1)
    assert core.plans() == ["stop a"]
    core.finish("a")
    assert core.record("a").gpus == (1,)


@pytest.mark.parametrize(
    "small",
    [
        model("a", gpus=(0,), gpu_memory=0.4),  # its GPUs are named
        anywhere("a", 0.7),  # no room elsewhere
        anywhere("a", 0.4, eviction=CHECKPOINT),  # its image is restored where it was made
    ],
)
def test_what_cannot_move_makes_room_where_it_is(small: ModelConfig) -> None:
    core = crossed(small)
    for _ in range(3):
        switch(core, "a", "large", START_SECS)
        switch(core, "large", "a", 1)
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.PARKED
    assert core.at("large") is ModelState.DRAINING
