"""The ladder: parked engines leave host memory by budget, by age and under pressure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from core_harness import DISCARD, OFFLOAD, STOP, Core, model

from llmux.config.schema import CheckpointConfig, Eviction, Process, Weights
from llmux.core.adopt import Note, Observation, adopt
from llmux.core.events import (
    ConfigChanged,
    EvictionSet,
    ImageKnown,
    MemoryPressure,
    OperationFinished,
    ParkAsked,
)
from llmux.core.plans import Outcome, StepKind, deepen_plan
from llmux.core.records import Draining, Parked, Parking, Stopping
from llmux.core.reducer import initial, reduce
from llmux.core.states import ModelState

GIB = 1024**3
FROZEN = Eviction(Weights.OFFLOAD, Process.FREEZE)
SUSPENDED = Eviction(Weights.DISCARD, Process.CUDA_SUSPEND)
IMAGE = Eviction(Weights.DISCARD, Process.CHECKPOINT)


def core_of(*names: str, below: tuple[Eviction, ...] = (STOP,), **policy: Any) -> Core:
    return Core(*(model(n, ladder=below, gpu_memory=0.3) for n in names), **policy)


def park(core: Core, name: str, gib: int) -> None:
    """From serving to rest in host memory, taking so much of it."""
    core.happen(ParkAsked(name))
    core.drained(name)
    finish(core, name, gib)


def finish(core: Core, name: str, gib: int) -> None:
    effect = core.running.pop(name)
    core.happen(OperationFinished(name, effect.op, effect.plan.success, host_bytes=gib * GIB))


def parked_by(core: Core, name: str) -> Eviction | None:
    phase = core.record(name).phase
    return phase.eviction if isinstance(phase, Parked) else None


def leave_when_idle(core: Core, max_image_bytes: int | None = None) -> None:
    """All models at once, after ten seconds without use."""
    config = core.state.config
    policy = replace(config.policy, idle_timeout_secs=10.0)
    checkpoint = CheckpointConfig(max_bytes=max_image_bytes)
    core.happen(ConfigChanged(replace(config, policy=policy, checkpoint=checkpoint)))
    core.pass_time(100)


def leaving(core: Core, name: str) -> Eviction:
    phase = core.record(name).phase
    assert isinstance(phase, (Draining, Parking))
    return phase.eviction


def test_the_least_valuable_goes_down_when_the_budget_is_exceeded() -> None:
    core = core_of("a", "b", parked_max_bytes=50 * GIB)
    core.serve("a")
    core.serve("b")
    for _ in range(5):  # b is used more: it is worth more
        core.demand("b", in_flight=1)
        core.demand("b")
    park(core, "b", 30)
    assert core.at("b") is ModelState.PARKED, "within the budget"
    park(core, "a", 30)
    phase = core.record("a").phase
    assert isinstance(phase, Stopping)
    assert phase.reason == "policy.parked_max_bytes is exceeded"
    assert core.at("b") is ModelState.PARKED
    core.finish("a")
    assert core.states() == {"a": "stopped", "b": "parked"}


def test_one_that_takes_no_host_memory_hides_nobody_behind_it() -> None:
    core = Core(
        model("a", eviction=IMAGE, gpu_memory=0.3),
        *(model(name, ladder=(STOP,), gpu_memory=0.3) for name in "bc"),
        parked_max_bytes=20 * GIB,
    )
    for name in "abc":
        core.serve(name)
    park(core, "a", 0)
    park(core, "b", 15)
    assert core.states() == {"a": "parked", "b": "parked", "c": "serving"}
    park(core, "c", 15)
    assert core.states() == {"a": "parked", "b": "stopping", "c": "parked"}


def test_a_higher_priority_keeps_its_place() -> None:
    core = Core(
        model("a", ladder=(STOP,), gpu_memory=0.3, priority=1),
        model("b", ladder=(STOP,), gpu_memory=0.3),
        parked_max_bytes=50 * GIB,
    )
    core.serve("a")
    core.serve("b")
    park(core, "a", 30)
    park(core, "b", 30)
    assert core.states() == {"a": "parked", "b": "stopping"}


def test_a_model_that_leaves_skips_rungs_that_the_budget_has_no_room_for() -> None:
    core = Core(model("a", ladder=(IMAGE, STOP)), model("b"), parked_max_bytes=10 * GIB)
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    finish(core, "a", 30)  # not known before
    core.finish("b")
    core.demand("b")
    assert core.at("a") is ModelState.STOPPING, "an image has other weights than it has now"
    core.finish("a")
    core.demand("a", waiting=1)
    core.park("b")
    core.finish("a")
    core.demand("a")
    core.demand("b", waiting=1)
    core.drained("a")
    assert core.running["a"].plan.eviction == IMAGE


def test_each_rung_lasts_an_idle_timeout() -> None:
    below = (FROZEN, Eviction(Weights.OFFLOAD, Process.CHECKPOINT), STOP)
    core = Core(model("a", ladder=below, idle_timeout_secs=60))
    core.serve("a")
    core.pass_time(60)
    core.park("a")
    seen = [str(parked_by(core, "a"))]
    for _ in range(2):
        core.pass_time(59)
        assert core.at("a") is ModelState.PARKED
        core.pass_time(1)
        core.finish("a")
        seen.append(str(parked_by(core, "a")))
    assert seen == ["offload+keep_running", "offload+freeze", "offload+checkpoint"]
    core.pass_time(1e6)
    assert core.at("a") is ModelState.PARKED, "an image takes no host memory"


def test_pressure_sends_them_down_one_at_a_time_until_it_ends() -> None:
    core = core_of("a", "b", "c")
    for name in "abc":
        core.serve(name)
        park(core, name, 1)
        core.now += 1
    core.happen(MemoryPressure(True))
    assert core.states() == {"a": "stopping", "b": "parked", "c": "parked"}, "longest unused first"
    core.finish("a")
    assert core.states() == {"a": "stopped", "b": "stopping", "c": "parked"}
    core.happen(MemoryPressure(False))
    core.finish("b")
    assert core.at("c") is ModelState.PARKED


def test_under_pressure_nothing_is_parked_in_host_memory_but_by_order() -> None:
    core = Core(model("a", ladder=(STOP,)), model("b", ladder=(STOP,)))
    core.serve("a")
    core.happen(MemoryPressure(True))
    core.demand("b", waiting=1)
    core.drained("a")
    assert core.running["a"].plan.eviction == STOP
    core.finish("a")
    core.finish("b")
    core.demand("b")
    core.happen(ParkAsked("b"))
    core.drained("b")
    assert core.running["b"].plan.eviction == OFFLOAD


def test_nothing_goes_down_under_a_wake_or_while_it_is_waited_for() -> None:
    core = core_of("a", "b", idle_timeout_secs=10.0)
    core.serve("a")
    park(core, "a", 1)
    core.demand("b", waiting=1)
    core.pass_time(100)
    assert core.states() == {"a": "parked", "b": "starting"}
    core.demand("a", waiting=1)
    core.finish("b")
    assert core.at("a") is ModelState.WAKING


def test_two_that_leave_at_once_do_not_both_take_the_last_room() -> None:
    core = core_of("a", "b", parked_max_bytes=50 * GIB)
    for name in "ab":
        core.serve(name)
        park(core, name, 30)  # what it takes is known from now on
        core.serve(name)
    leave_when_idle(core)
    assert sorted(leaving(core, name).process for name in "ab") == ["keep_running", "stop"]


@pytest.mark.parametrize("wanted", [False, True], ids=["idle", "for another model"])
def test_one_that_leaves_beside_one_without_a_ladder_leaves_it_the_room(wanted: bool) -> None:
    core = Core(
        model("a", ladder=(STOP,), gpu_memory=0.3),
        model("b", gpu_memory=0.3),
        model("whole", gpu_memory=0.75),
        parked_max_bytes=50 * GIB,
    )
    for name in "ab":
        core.serve(name)
        park(core, name, 30)
        core.serve(name)
    if wanted:
        core.demand("whole", waiting=1)
    else:
        leave_when_idle(core)
    assert leaving(core, "a").process is Process.STOP
    assert leaving(core, "b").process is Process.KEEP_RUNNING


def test_a_model_whose_image_has_no_room_beside_others_is_stopped() -> None:
    image = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
    core = Core(*(model(n, eviction=image, ladder=(STOP,), gpu_memory=0.3) for n in "ab"))
    for name in "ab":
        core.serve(name)
        core.happen(ImageKnown(name, image, 30 * GIB))
    core.happen(ImageKnown("b", None))  # what it would take again is still known
    leave_when_idle(core, max_image_bytes=50 * GIB)
    assert sorted(leaving(core, name).process for name in "ab") == ["checkpoint", "stop"]


def test_what_is_parked_and_has_no_room_for_an_image_is_stopped_by_the_rung_below() -> None:
    core = core_of("a", below=(Eviction(Weights.OFFLOAD, Process.CHECKPOINT), STOP))
    core.serve("a")
    park(core, "a", 30)
    config = replace(core.state.config, checkpoint=CheckpointConfig(max_bytes=GIB))
    core.happen(ConfigChanged(config))
    core.happen(MemoryPressure(True))
    assert core.at("a") is ModelState.STOPPING


def test_one_that_a_former_supervisor_parked_goes_down_although_nobody_has_used_it() -> None:
    config = core_of("a").state.config
    seen = Observation("a", False, True, True, Note(ModelState.PARKED, eviction=OFFLOAD))
    state, _ = adopt(initial(config, gpu_count=1, epoch_prefix="new"), [seen], images=[], now=100.0)
    state, _ = reduce(state, MemoryPressure(True), 100.0)
    assert state.models["a"].state is ModelState.STOPPING


def test_without_a_ladder_nothing_goes_down() -> None:
    core = core_of("a", below=(), parked_max_bytes=GIB, idle_timeout_secs=10.0)
    core.serve("a")
    park(core, "a", 30)
    core.happen(MemoryPressure(True))
    core.pass_time(1e6)
    assert core.at("a") is ModelState.PARKED


def test_an_operators_eviction_has_no_rungs_below_it() -> None:
    core = core_of("a", parked_max_bytes=GIB)
    core.serve("a")
    core.happen(EvictionSet("a", DISCARD))
    park(core, "a", 30)
    assert parked_by(core, "a") == DISCARD


def test_an_image_that_cannot_be_written_is_not_tried_again_and_again() -> None:
    image = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
    core = Core(model("a", ladder=(image,)), parked_max_bytes=GIB)
    core.serve("a")
    park(core, "a", 30)
    effect = core.running.pop("a")
    assert effect.plan.eviction == image
    core.happen(OperationFinished("a", effect.op, Outcome.PARKED, "the disk is full", OFFLOAD))
    assert core.at("a") is ModelState.PARKED
    core.pass_time(1)
    assert core.at("a") is ModelState.PARKED


def test_going_down_claims_no_more_of_the_gpu_than_the_parked_engine_has() -> None:
    core = core_of("a", "b", below=(FROZEN, STOP), parked_max_bytes=GIB)
    core.serve("a")
    park(core, "a", 30)
    assert core.at("a") is ModelState.PARKING
    parking = core.record("a").phase
    assert isinstance(parking, Parking)
    assert parking.share == 0.03
    core.finish("a")
    phase = core.record("a").phase
    assert isinstance(phase, Stopping)
    assert phase.share == 0.03


@pytest.mark.parametrize(
    ("present", "deeper", "steps"),
    [
        (OFFLOAD, FROZEN, ["freeze", "verify_release"]),
        (DISCARD, SUSPENDED, ["cuda_suspend", "freeze", "verify_release"]),
        (
            Eviction(Weights.DISCARD, Process.FREEZE),
            IMAGE,
            ["thaw", "reset_prefix_cache", "cuda_suspend", "dump", "verify_release"],
        ),
        (SUSPENDED, IMAGE, ["thaw", "dump", "verify_release"]),
    ],
)
def test_what_is_done_is_not_done_again(
    present: Eviction, deeper: Eviction, steps: list[str]
) -> None:
    plan = deepen_plan(model("a"), present, deeper)
    known = {StepKind(word) for word in steps}
    assert [step.kind for step in plan.steps if step.kind in known] == steps
    assert StepKind.SLEEP not in {step.kind for step in plan.steps}
    assert plan.eviction == deeper
    assert plan.success is Outcome.PARKED
