"""What of a restore or a load needs no GPU is ordered while room is being made, and dropped when
the model is not woken after all."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
from core_harness import DISCARD, FREEZE, OFFLOAD, STOP, WORKER, Core, config_of, model

from llmux.config.schema import Eviction, PolicyConfig, Process, Weights
from llmux.core.effects import (
    DropAhead,
    EndReading,
    ReadAhead,
    ReadWeights,
    RestoreAhead,
    RunPlan,
)
from llmux.core.events import ConfigChanged, ImageKnown, LoadAsked, ModeSet, ParkAsked, WorkerLeft
from llmux.core.plans import Outcome
from llmux.core.records import goes_into_ram
from llmux.core.states import ModelState

CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)


def parked_beside_one_that_serves(victim: Eviction = OFFLOAD, **policy: Any) -> Core:
    """a is parked in an image, b serves with a request in flight; they do not fit together."""
    core = Core(model("a", eviction=CHECKPOINT), model("b", eviction=victim), **policy)
    core.serve("a")
    core.demand("b", waiting=1)
    core.pass_time(policy.get("min_active_secs", 0.0))
    core.drained("a")
    core.happen(ImageKnown("a", CHECKPOINT))
    core.finish("a")
    core.finish("b")
    core.demand("b", in_flight=1)
    assert core.at("a") is ModelState.PARKED
    return core


def wanted(victim: Eviction = OFFLOAD, **policy: Any) -> Core:
    core = parked_beside_one_that_serves(victim, **policy)
    core.demand("a", waiting=1)
    return core


def names(core: Core) -> list[str]:
    return [type(effect).__name__ for effect in core.effects]


def test_it_is_ordered_when_the_switch_is_decided() -> None:
    core = wanted()
    (order,) = core.done(RestoreAhead)
    assert order == RestoreAhead(
        "a", core.record("a").config, (0,), ("b",), PolicyConfig().request_timeout_secs
    )
    assert names(core)[:1] == ["ReadAhead"]
    core.pass_time(1)
    assert (core.done(RestoreAhead), core.done(ReadAhead)) == ([], []), "once"


def test_the_wake_takes_it_over() -> None:
    core = wanted()
    core.park("b")
    assert core.plans() == ["wake a"]
    assert core.done(DropAhead) == []
    core.finish("a")
    assert core.at("a") is ModelState.SERVING
    assert core.done(DropAhead) == []


def test_with_room_at_once_nothing_is_done_ahead() -> None:
    core = parked_beside_one_that_serves()
    core.happen(ParkAsked("b", STOP))
    core.park("b")
    core.demand("a", waiting=1)
    assert core.plans() == ["wake a"]
    assert core.done(RestoreAhead) == []


@pytest.mark.parametrize("way", [OFFLOAD, DISCARD, FREEZE, STOP], ids=str)
def test_only_an_image_can_be_restored(way: Eviction) -> None:
    core = Core(model("a", eviction=way), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.park("a")
    core.finish("b")
    core.demand("b", in_flight=1)
    core.demand("a", waiting=1)
    assert core.done(RestoreAhead) == []


def test_not_before_somebody_leaves_for_it() -> None:
    """A restored engine takes host memory: not for as long as the other may stay."""
    core = wanted(min_active_secs=30.0)
    assert core.at("b") is ModelState.SERVING
    assert core.done(RestoreAhead) == []
    assert [order.model for order in core.done(ReadAhead)] == ["a"]
    core.pass_time(30)
    assert core.at("b") is ModelState.DRAINING
    assert [order.model for order in core.done(RestoreAhead)] == ["a"]


def test_who_leaves_for_host_memory_is_named() -> None:
    for way, into_ram in {
        STOP: False,
        FREEZE: False,
        DISCARD: False,
        OFFLOAD: True,
        Eviction(Weights.RETAIN, Process.CUDA_SUSPEND): True,
        Eviction(Weights.OFFLOAD, Process.CHECKPOINT): True,
        Eviction(Weights.RETAIN, Process.CHECKPOINT): True,
        CHECKPOINT: False,
    }.items():
        core = parked_beside_one_that_serves()
        core.happen(ParkAsked("b", way))
        assert goes_into_ram(core.record("b")) is into_ram, way
        if way.process is Process.CHECKPOINT:
            core.happen(ImageKnown("b", way))
            assert not goes_into_ram(core.record("b")), "only killed: its image is there"


# ---- when it is not to be after all -------------------------------------------------------------


def dropped(core: Core) -> bool:
    return core.done(DropAhead) == [DropAhead("a")]


def test_the_last_client_leaves() -> None:
    core = wanted()
    core.demand("a")
    assert dropped(core)
    assert core.at("b") is ModelState.SERVING, "and the other stays"
    core.pass_time(1)
    assert core.done(DropAhead) == [], "once"


def test_one_that_comes_back_begins_anew() -> None:
    core = wanted()
    core.demand("a")
    core.demand("a", waiting=1)
    assert [order.model for order in core.done(RestoreAhead)] == ["a"]


def test_the_gateway_dies() -> None:
    core = wanted()
    core.happen(WorkerLeft(WORKER))
    assert dropped(core)


def test_manual_mode_begins() -> None:
    core = wanted()
    core.happen(ModeSet(manual=True))
    assert dropped(core)


def test_an_operator_unloads_it() -> None:
    core = wanted()
    core.happen(ParkAsked("a", STOP))
    assert dropped(core)
    assert core.plans() == ["stop a"]
    core.finish("a")
    # its client still waits: from the image, as before
    assert [order.model for order in core.done(RestoreAhead)] == ["a"]


def test_its_image_is_lost_before_the_room_is_there() -> None:
    core = parked_beside_one_that_serves()
    core.happen(ParkAsked("a", STOP))
    core.finish("a")
    core.demand("a", waiting=1)
    assert len(core.done(RestoreAhead)) == 1, "stopped, and its image is on disk"
    core.happen(ImageKnown("a", None))
    assert dropped(core)
    core.park("b")
    assert core.plans() == ["start a"]
    assert core.done(DropAhead) == []


def test_the_victim_cannot_be_moved() -> None:
    core = wanted()
    core.demand("b")
    core.drained("b")
    core.finish("b", Outcome.STUCK)
    assert dropped(core)


def test_the_model_is_removed_from_the_configuration() -> None:
    for phase in ("parked", "stopped"):
        core = parked_beside_one_that_serves()
        if phase == "stopped":
            core.happen(ParkAsked("a", STOP))
            core.finish("a")
        core.demand("a", waiting=1)
        assert len(core.done(RestoreAhead)) == 1
        core.happen(ConfigChanged(config_of(model("b"))))
        assert dropped(core), phase
        if "a" in core.state.models:
            core.finish("a")
        assert set(core.state.models) == {"b"}
        assert core.state.reservations == MappingProxyType({})


def test_a_model_that_an_operator_waits_for_may_be_removed() -> None:
    core = Core(model("a"), model("b"))
    core.serve("b")
    core.demand("b", in_flight=1)
    core.happen(LoadAsked("a"))
    assert "a" in core.state.reservations
    core.happen(ConfigChanged(config_of(model("b"))))
    assert set(core.state.models) == {"b"}
    assert not core.state.reservations
    assert not core.state.wants


def test_who_asks_for_a_model_that_is_on_its_way_out_is_told() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.happen(ConfigChanged(config_of(model("b"))))
    assert core.at("a") is not ModelState.STOPPED
    core.demand("a", waiting=1)
    assert core.refused() == [("a", "model_not_found")]


def test_a_cold_start_after_a_failed_wake_finds_nothing_ahead() -> None:
    core = wanted()
    core.park("b")
    core.finish("a", Outcome.DOWN)
    assert [plan.plan.kind for plan in core.done(RunPlan)] == ["start"]
    assert core.done(DropAhead) == []


# ---- weights: where the way back loads them ----------------------------------------------------

RETAIN_SUSPENDED = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
DISCARD_SUSPENDED = Eviction(Weights.DISCARD, Process.CUDA_SUSPEND)


def wanted_back(way: Eviction, **policy: Any) -> Core:
    """a was parked by ``way``, b serves with a request in flight, and a is wanted again."""
    core = Core(model("a", eviction=way), model("b"), **policy)
    core.serve("a")
    core.demand("b", waiting=1)
    core.pass_time(policy.get("min_active_secs", 0.0))
    core.drained("a")
    if way.process is Process.CHECKPOINT:
        core.happen(ImageKnown("a", way))
    core.finish("a")
    core.finish("b")
    core.demand("b", in_flight=1)
    core.demand("a", waiting=1)
    return core


@pytest.mark.parametrize("way", [STOP, DISCARD, DISCARD_SUSPENDED, CHECKPOINT], ids=str)
def test_what_loads_weights_on_its_way_back_has_them_read(way: Eviction) -> None:
    core = wanted_back(way)
    assert core.at("b") is ModelState.DRAINING
    assert core.done(ReadWeights) == [ReadWeights("a", core.record("a").config, (0,))]
    core.pass_time(1)
    assert core.done(ReadWeights) == [], "once"


@pytest.mark.parametrize("way", [OFFLOAD, RETAIN_SUSPENDED], ids=str)
def test_what_has_its_weights_reads_none(way: Eviction) -> None:
    assert wanted_back(way).done(ReadWeights) == []


def test_weights_are_not_read_before_somebody_leaves_for_it() -> None:
    core = wanted_back(DISCARD, min_active_secs=30.0)
    assert (core.at("b"), core.done(ReadWeights)) == (ModelState.SERVING, [])
    core.pass_time(30)
    assert [order.model for order in core.done(ReadWeights)] == ["a"]


def test_a_start_at_once_reads_by_itself() -> None:
    core = Core(model("a"))
    core.demand("a", waiting=1)
    assert core.plans() == ["start a"]
    assert core.done(ReadWeights) == []


def test_a_start_behind_another_on_the_same_gpu_has_them_read() -> None:
    core = Core(model("a", gpu_memory=0.4), model("b", gpu_memory=0.4))
    core.demand("a", waiting=1)
    core.demand("b", waiting=1)
    assert [order.model for order in core.done(ReadWeights)] == ["b"]


def test_reading_ends_when_the_model_serves() -> None:
    core = wanted_back(DISCARD)
    core.park("b")
    assert core.done(EndReading) == [], "it has only begun to load"
    core.finish("a")
    assert core.at("a") is ModelState.SERVING
    assert core.done(EndReading) == [EndReading("a")]


def test_reading_ends_when_nobody_wants_it() -> None:
    core = wanted_back(DISCARD)
    core.demand("a", waiting=0)
    assert core.done(EndReading) == [EndReading("a")]
