"""The claim on a GPU ends when its memory was seen gone, not when the image is on disk."""

from __future__ import annotations

import pytest
from core_harness import CHECKPOINT, STOP, Core, model

from llmux.core.events import GpuReleased, ImageKnown, LoadAsked, ParkAsked
from llmux.core.plans import Outcome
from llmux.core.records import goes_into_ram, share_now
from llmux.core.states import ModelState


@pytest.fixture
def core() -> Core:
    """a is being parked in an image for b, which waits."""
    core = Core(model("a", eviction=CHECKPOINT), model("b", eviction=CHECKPOINT))
    core.serve("a")
    core.demand("b", waiting=1)
    core.drained("a")
    assert (core.at("a"), core.at("b")) == (ModelState.PARKING, ModelState.STOPPED)
    return core


def test_the_next_model_starts_while_the_image_is_written(core: Core) -> None:
    core.release("a")
    assert core.plans() == ["start b"]
    assert core.at("a") is ModelState.PARKING
    assert share_now(core.record("a")) == 0
    assert not goes_into_ram(core.record("a"))
    core.finish("b")
    core.finish("a")
    assert (core.at("a"), core.at("b")) == (ModelState.PARKED, ModelState.SERVING)


def test_a_release_of_another_operation_means_nothing(core: Core) -> None:
    core.happen(GpuReleased("a", core.running["a"].op + 7))
    assert core.plans() == []
    core.happen(GpuReleased("nosuch", 1))
    core.finish("a")
    core.happen(GpuReleased("a", core.running["b"].op))
    assert core.at("a") is ModelState.PARKED


def test_what_a_switch_costs_ends_with_the_release(core: Core) -> None:
    core.pass_time(2)
    core.release("a")
    core.pass_time(40)
    core.finish("a")
    assert core.state.costs["a", f"park by {CHECKPOINT}"] == 2


def test_a_model_that_is_wanted_again_comes_back_from_its_image(core: Core) -> None:
    core.release("a")
    core.finish("b")
    core.demand("b")
    core.demand("a", waiting=1)
    assert core.at("a") is ModelState.PARKING, "the dump cannot be undone"
    assert core.at("b") is ModelState.SERVING
    core.happen(ImageKnown("a", CHECKPOINT))
    core.finish("a")
    core.drained("b")
    core.release("b")
    assert core.plans() == ["wake a"]


def test_an_order_to_stop_waits_for_the_image(core: Core) -> None:
    core.release("a")
    core.happen(ParkAsked("a", STOP))
    core.finish("b")
    core.finish("a")
    core.finish("a")
    assert core.at("a") is ModelState.STOPPED


def test_one_that_ends_without_an_image_takes_no_room(core: Core) -> None:
    core.release("a")
    core.finish("a", Outcome.DOWN, "the disk is full")
    assert (core.at("a"), core.at("b")) == (ModelState.STOPPED, ModelState.STARTING)


def test_one_that_cannot_be_killed_holds_no_gpu(core: Core) -> None:
    core.release("a")
    core.finish("b")
    core.finish("a", Outcome.STUCK, "a task in uninterruptible sleep")
    assert core.at("a") is ModelState.FAILED
    assert share_now(core.record("a")) == 0
    core.pass_time(core.state.config.policy.backoff_secs)
    assert core.plans() == ["stop a"], "it is tried again"
    assert share_now(core.record("a")) == 0


def test_one_that_hangs_holds_no_gpu(core: Core) -> None:
    core.release("a")
    core.finish("b")
    core.demand("b")
    core.pass_time(core.record("a").overdue_at)
    assert core.at("a") is ModelState.FAILED
    assert share_now(core.record("a")) == 0
    assert core.at("b") is ModelState.SERVING
    core.happen(LoadAsked("b"))
    assert core.at("b") is ModelState.SERVING


def test_what_was_not_seen_gone_is_held(core: Core) -> None:
    core.finish("a", Outcome.STUCK, "a task in uninterruptible sleep")
    assert share_now(core.record("a")) == core.record("a").config.gpu_memory
    assert core.plans() == []
