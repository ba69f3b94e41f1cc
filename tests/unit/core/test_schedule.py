"""Who gets room: claims on GPU memory, the line, victims, placement."""

from __future__ import annotations

import math

import pytest
from core_harness import DISCARD, FREEZE, OFFLOAD, STOP, WORKER, Core, model

from llmux.config.schema import (
    GPU_RESIDUE,
    Eviction,
    ModelConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.core.effects import RunPlan, SendRefuse, SwitchFinished
from llmux.core.events import LoadAsked, ParkAsked, PinSet, WorkerDrained
from llmux.core.plans import Outcome
from llmux.core.records import parked_share
from llmux.core.states import ModelState
from llmux.errors import Reason

RETAIN = Eviction(Weights.RETAIN, Process.KEEP_RUNNING)


def small(name: str, share: float = 0.45, **settings: object) -> ModelConfig:
    return model(name, gpu_memory=share, **settings)


# ---- claims -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eviction", "settings", "share"),
    [
        (OFFLOAD, {}, GPU_RESIDUE),
        (DISCARD, {}, GPU_RESIDUE),
        (Eviction(Weights.OFFLOAD, Process.FREEZE), {}, GPU_RESIDUE),
        (RETAIN, {}, 0.9),
        (FREEZE, {}, 0.9),
        (RETAIN, {"gpu_memory_parked": 0.2}, 0.2),
        (OFFLOAD, {"gpu_memory_parked": 0.1}, 0.1),
        (STOP, {"gpu_memory_parked": 0.2}, 0.0),
        (Eviction(Weights.RETAIN, Process.CUDA_SUSPEND), {}, 0.0),
        (Eviction(Weights.DISCARD, Process.CHECKPOINT), {}, 0.0),
    ],
)
def test_what_a_parked_model_still_claims(
    eviction: Eviction, settings: dict[str, float], share: float
) -> None:
    assert parked_share(model("a", **settings), eviction) == share


def test_models_that_fit_together_are_awake_together() -> None:
    core = Core(small("a"), small("b"), small("c", 0.1))
    for name in ("a", "b", "c"):
        core.serve(name)
    assert set(core.states().values()) == {"serving"}


def test_nothing_is_woken_while_its_room_is_still_being_left() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    assert core.at("a") is ModelState.PARKING
    core.demand("b", waiting=2)
    assert core.plans() == []
    core.finish("a")
    assert core.plans() == ["start b"]


def test_a_model_that_cannot_free_memory_by_its_own_eviction_is_stopped_for_another() -> None:
    core = Core(model("a", eviction=FREEZE), model("b"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    (plan,) = core.done(RunPlan)
    assert plan.plan.success is Outcome.DOWN
    assert plan.plan.eviction is not None
    assert plan.plan.eviction.process is Process.STOP


def test_an_operator_may_freeze_a_model_in_place() -> None:
    core = Core(model("a", eviction=FREEZE))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    assert core.at("a") is ModelState.PARKED


def test_co_resident_frozen_models_wake_without_anybody_leaving() -> None:
    core = Core(small("a", eviction=FREEZE), small("b"))
    core.serve("a")
    core.serve("b")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("a", waiting=1)
    assert core.plans() == ["wake a"]
    assert core.at("b") is ModelState.SERVING


# ---- victims ------------------------------------------------------------------------------------


def test_only_those_that_must_leave_do() -> None:
    core = Core(small("a", 0.3), small("b", 0.3), small("c", 0.3), small("d", 0.3))
    for name in ("a", "b", "c"):
        core.serve(name)
        core.now += 1
    core.demand("d", waiting=1)
    assert core.states() == {"a": "draining", "b": "serving", "c": "serving", "d": "stopped"}


def test_whoever_turned_out_not_to_be_needed_stays() -> None:
    core = Core(small("a", 0.1), small("b", 0.8), small("c", 0.8))
    core.serve("a")  # used longest ago: chosen first, though it helps too little
    core.now += 1
    core.serve("b")
    core.demand("c", waiting=1)
    assert core.states() == {"a": "serving", "b": "draining", "c": "stopped"}


def test_idle_models_leave_before_busy_ones() -> None:
    core = Core(small("a"), small("b"), small("c"))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.now += 1
    core.serve("b")
    core.demand("c", waiting=1)
    assert core.states() == {"a": "serving", "b": "draining", "c": "stopped"}


def test_residues_of_parked_models_are_stopped_when_they_are_in_the_way() -> None:
    core = Core(model("a"), model("big", gpu_memory=1.0))
    core.serve("a")
    core.happen(ParkAsked("a"))
    core.park("a")
    core.demand("big", waiting=1)
    assert core.plans() == ["stop a"]
    core.finish("a")
    assert core.plans() == ["start big"]
    core.finish("big")
    (switch,) = core.done(SwitchFinished)
    assert switch.victims == ("a",)


def test_a_serving_model_parks_as_stopped_when_its_residue_would_be_in_the_way() -> None:
    core = Core(model("a"), model("big", gpu_memory=0.98))
    core.serve("a")
    core.demand("big", waiting=1)
    core.drained("a")
    (plan,) = core.done(RunPlan)
    assert plan.plan.success is Outcome.DOWN


def test_residues_that_leave_room_enough_stay() -> None:
    core = Core(model("a"), model("b"), model("c"))
    core.serve("a")
    core.demand("b", waiting=1)
    core.park("a")
    core.finish("b")
    core.demand("c", waiting=1)
    core.park("b")
    core.finish("c")
    assert core.states() == {"a": "parked", "b": "parked", "c": "serving"}


def test_a_model_that_can_never_have_room_beside_the_pinned_one_waits() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.happen(PinSet("a", math.inf))
    core.demand("b", waiting=1)
    assert core.effects == ()
    core.happen(PinSet("a", None))
    assert core.at("a") is ModelState.DRAINING


# ---- the line -----------------------------------------------------------------------------------


def test_whoever_has_waited_longest_is_next() -> None:
    core = Core(model("a"), model("b"), model("c"), min_active_secs=10.0)
    core.serve("a")
    core.demand("b", waiting=1, age=1.0)
    core.demand("c", waiting=9, age=5.0)
    core.pass_time(10)
    core.park("a")
    assert core.plans() == ["start c"]


def test_room_that_is_being_made_is_not_given_to_somebody_behind() -> None:
    core = Core(small("a"), small("b"), model("big"), small("c", 0.1))
    core.serve("a")
    core.serve("b")
    core.demand("big", waiting=1, age=2.0)
    assert (core.at("a"), core.at("b")) == (ModelState.DRAINING, ModelState.DRAINING)
    core.park("a")
    core.demand("c", waiting=1, age=1.0)  # would fit now, but then big never would
    assert core.plans() == []
    core.park("b")
    assert core.plans()[0] == "start big"


def test_somebody_behind_may_go_where_nobody_waits_for_room() -> None:
    core = Core(
        small("a", 0.9, gpus=(0,)), small("b", 0.9, gpus=(0,)), small("c", 0.9, gpus=(1,)),
        gpu_count=2,
    )  # fmt: skip
    core.serve("a")
    core.demand("b", waiting=1, age=9.0)
    core.demand("c", waiting=1)
    assert core.plans() == ["start c"]


def test_a_model_serves_its_least_time_before_it_makes_room() -> None:
    core = Core(model("a"), model("b"), min_active_secs=5.0)
    core.serve("a")
    core.demand("a", in_flight=1)
    served_at = core.now
    core.now += 2
    core.demand("b", waiting=1)
    assert core.effects == ()
    assert core.state.wakeup == served_at + 5
    core.pass_time(3)
    assert core.at("a") is ModelState.DRAINING


def test_demand_that_comes_during_a_drain_does_not_turn_it_back() -> None:
    core = Core(model("a"), model("b"))
    core.serve("a")
    core.demand("a", in_flight=1)
    core.demand("b", waiting=1)
    core.now += 1
    core.demand("a", waiting=1, in_flight=1)
    assert core.states() == {"a": "draining", "b": "stopped"}
    core.demand("a", waiting=1)
    epoch = core.record("a").epoch
    assert epoch is not None
    core.happen(WorkerDrained(WORKER, "a", epoch))
    core.finish("a")
    assert core.plans() == ["start b"]
    core.finish("b")
    core.demand("b", in_flight=1)
    assert core.at("b") is ModelState.DRAINING  # a waits


@pytest.mark.parametrize("kind", list(PolicyType))
@pytest.mark.parametrize("priority", [0, 5])
def test_a_model_that_left_for_another_does_not_come_back_before_it(
    kind: PolicyType, priority: int
) -> None:
    core = Core(
        model("a", priority=priority), model("b"), policy_type=kind, amortization_factor=0.0
    )
    core.serve("a")
    core.demand("b", waiting=1)
    core.demand("a", waiting=500, age=9.0)  # more, and older, than b's
    epoch = core.record("a").epoch
    assert epoch is not None
    core.happen(WorkerDrained(WORKER, "a", epoch))
    core.finish("a")
    assert core.plans() == ["start b"]


def test_a_model_that_nobody_waits_for_any_more_gives_its_place_up() -> None:
    core = Core(model("a"), model("b"), min_active_secs=5.0)
    core.serve("a")
    core.demand("b", waiting=1)
    assert set(core.state.reservations) == {"b"}
    core.demand("b")
    assert core.state.reservations == {}
    core.pass_time(5)
    assert core.at("a") is ModelState.SERVING


# ---- placement ----------------------------------------------------------------------------------


def test_a_count_is_placed_on_the_emptiest_gpus() -> None:
    core = Core(model("a", gpus=(1,)), model("b", gpus=2), gpu_count=3)
    core.serve("a")
    core.demand("b", waiting=1)
    (plan,) = core.done(RunPlan)
    assert plan.gpus == (0, 2)


def test_two_models_on_different_gpus_are_independent() -> None:
    core = Core(model("a", gpus=1), model("b", gpus=1), gpu_count=2)
    core.serve("a")
    core.serve("b")
    assert {core.record("a").gpus, core.record("b").gpus} == {(0,), (1,)}


def test_a_parked_engine_wakes_where_it_is_and_makes_room_there() -> None:
    core = Core(model("a", gpus=1), model("b", gpus=(0,)), gpu_count=2)
    core.demand("a", waiting=1)
    core.now += 60  # a start elsewhere would take as long again
    core.finish("a")
    core.demand("a")
    assert core.record("a").gpus == (0,)
    core.demand("b", waiting=1)
    core.park("a")
    core.finish("b")
    core.now += 400  # b is hardly used
    core.demand("a", waiting=1)  # GPU 1 is empty, but a lives on 0
    assert core.at("b") is ModelState.DRAINING


def test_a_model_over_two_gpus_needs_room_on_both() -> None:
    core = Core(model("a", gpus=(0,)), model("b", gpus=(1,)), model("wide", gpus=2), gpu_count=2)
    core.serve("a")
    core.serve("b")
    core.demand("wide", waiting=1)
    assert core.states() == {"a": "draining", "b": "draining", "wide": "stopped"}
    core.park("a")
    assert core.plans() == []
    core.park("b")
    assert core.plans() == ["start wide"]


@pytest.mark.parametrize(
    ("gpus", "wanted"), [(2, "2 GPUs"), ((0, 1), "GPUs [0, 1]"), ((3,), "GPUs [3]")]
)
def test_gpus_that_this_host_does_not_have_are_refused(
    gpus: int | tuple[int, ...], wanted: str
) -> None:
    core = Core(model("a", gpus=gpus))
    core.demand("a", waiting=1)
    assert core.refused() == [("a", Reason.CANNOT_FIT)]
    (refusal,) = core.done(SendRefuse)
    assert f'model "a" wants {wanted}, but this host has 1; change' in refusal.message
    core.happen(LoadAsked("a"))
    assert core.state.wants == {}


def test_a_model_goes_to_the_gpu_whose_models_are_idle() -> None:
    core = Core(model("a", gpus=(0,)), model("b", gpus=(1,)), model("c", gpus=1), gpu_count=2)
    core.serve("a")
    core.demand("a", in_flight=1)
    core.serve("b")
    core.demand("c", waiting=1)
    assert core.states() == {"a": "serving", "b": "draining", "c": "stopped"}
    core.park("b")
    (plan,) = core.done(RunPlan)
    assert plan.gpus == (1,)


def test_a_model_does_not_wait_for_a_gpu_whose_model_never_leaves() -> None:
    core = Core(
        model("a", gpus=(0,), never_evict=True),
        model("b", gpus=(1,)),
        model("c", gpus=1),
        gpu_count=2,
    )
    core.serve("b")
    core.demand("b", in_flight=1)
    core.serve("a")
    core.demand("c", waiting=1)
    assert core.states() == {"a": "serving", "b": "draining", "c": "stopped"}
