"""An operation always ends: whatever a step raises, by the cheapest rung that is left."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from runtime_harness import (
    DISCARD,
    OFFLOAD,
    Shop,
    begin_life,
    config_of,
    in_loop,
    model,
)

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.plans import Outcome, Plan, park_plan, start_plan, wake_plan
from llmux.errors import Blame, CheckpointFailed, DriverError, LlmuxError, TreeState
from llmux.protocol import Ask
from tests.twins.disk import MemoryStore
from tests.twins.world import World

CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
MODEL = model("a", eviction=CHECKPOINT)
START = start_plan(MODEL, 60.0)

# (the twin's operation, the eviction it is parked by before, the plan in which it is a step)
STEPS: list[tuple[str, Eviction | None, Plan]] = [
    ("units.start", None, START),
    ("engine.wait_healthy", None, START),
    ("engine.canary", None, START),
    ("engine.sleep", None, park_plan(MODEL, OFFLOAD)),
    ("checkpointer.dump", None, park_plan(MODEL, CHECKPOINT)),
    ("checkpointer.find", None, park_plan(MODEL, CHECKPOINT)),
    ("engine.wake", OFFLOAD, wake_plan(MODEL, OFFLOAD)),
    ("engine.reload_weights", DISCARD, wake_plan(MODEL, DISCARD)),
    ("checkpointer.restore", CHECKPOINT, wake_plan(MODEL, CHECKPOINT)),
]
UNEXPECTED = [
    OverflowError("cannot convert float infinity to integer"),
    RecursionError("maximum recursion depth exceeded"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    KeyError("choices"),
]
NAMES = [f"{operation}-{plan.kind}" for operation, _, plan in STEPS]


def unharmed(tree: TreeState = TreeState.RUNNING) -> CheckpointFailed:
    text = "a socket of vLLM's hub is open"
    return CheckpointFailed("checkpoint", "a", text, tree=tree, blame=Blame.ENGINE)


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("operation", "parked", "plan"), STEPS, ids=NAMES)
@in_loop
async def test_an_operation_ends_whatever_its_step_raises(
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    parked: Eviction | None,
    plan: Plan,
    error: Exception,
) -> None:
    shop = Shop(world, str(tmp_path))
    if plan is not START:
        await shop.run(MODEL, START)
    if parked is not None:
        assert (await shop.run(MODEL, park_plan(MODEL, parked))).outcome is Outcome.PARKED
    world.fail(operation, error)
    with caplog.at_level(logging.WARNING):
        ended = await shop.run(MODEL, plan)
    assert ended.outcome is Outcome.DOWN
    assert (str(error) or type(error).__name__) in ended.detail
    assert [record for record in caplog.records if record.exc_info]  # the traceback is logged
    assert world.engines == {}
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP


@in_loop
async def test_a_last_rung_that_raises_anything_ends_as_stuck(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("engine.sleep", RuntimeError("can't start new thread"))
    world.fail("units.kill", AssertionError())
    ended = await shop.run(MODEL, park_plan(MODEL, OFFLOAD))
    assert ended.outcome is Outcome.STUCK
    assert ended.detail.endswith("can't start new thread; then AssertionError")


@in_loop
async def test_an_optional_step_that_raises_anything_is_passed_over(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    world.fail("engine.describe", OverflowError("infinity"))
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP
    assert ("describe", "failed") in shop.phases


@pytest.mark.parametrize(
    ("eviction", "kept"),
    [
        (CHECKPOINT, Eviction(Weights.DISCARD, Process.CUDA_SUSPEND)),
        (
            Eviction(Weights.RETAIN, Process.CHECKPOINT),
            Eviction(Weights.RETAIN, Process.CUDA_SUSPEND),
        ),
    ],
    ids=str,
)
@in_loop
async def test_a_dump_that_harmed_nothing_leaves_the_engine_in_host_memory(
    world: World, tmp_path: Path, eviction: Eviction, kept: Eviction
) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    pid = world.engines["a"].handle.pid
    world.fail("checkpointer.dump", unharmed())
    ended = await shop.run(MODEL, park_plan(MODEL, eviction))
    assert (ended.outcome, ended.eviction) == (Outcome.PARKED, kept)
    assert "a socket of vLLM's hub is open" in ended.detail
    assert world.used(0) == 0
    assert (await shop.run(MODEL, wake_plan(MODEL, kept))).outcome is Outcome.UP
    assert world.engines["a"].handle.pid == pid
    assert world.violations == []


@pytest.mark.parametrize("error", [DriverError("freeze", "a", "it is odd"), RuntimeError("odd")])
@in_loop
async def test_one_that_cannot_stay_there_either_ends(
    world: World, tmp_path: Path, error: Exception
) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("checkpointer.dump", unharmed())
    world.fail("freezer.freeze", error)
    ended = await shop.run(MODEL, park_plan(MODEL, CHECKPOINT))
    assert (ended.outcome, ended.eviction) == (Outcome.DOWN, None)
    assert "a socket of vLLM's hub is open" in ended.detail
    assert "; then " in ended.detail and "odd" in ended.detail
    assert world.engines == {}


@pytest.mark.parametrize("tree", [TreeState.BROKEN, TreeState.GONE])
@in_loop
async def test_a_dump_that_harmed_the_engine_ends_it(
    world: World, tmp_path: Path, tree: TreeState
) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("checkpointer.dump", unharmed(tree))
    ended = await shop.run(MODEL, park_plan(MODEL, CHECKPOINT))
    assert (ended.outcome, ended.eviction) == (Outcome.DOWN, None)
    assert world.engines == {}


@in_loop
async def test_a_switch_goes_on_when_no_image_could_be_made(world: World, tmp_path: Path) -> None:
    config = config_of(MODEL, model("b"))
    life = await begin_life(config, world, str(tmp_path), MemoryStore())
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    world.fail("checkpointer.dump", unharmed())
    life.demand("b", waiting=1)
    await life.until_state("b", "serving")
    assert life.state_of("a") == "parked"
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    assert world.names("units.start") == ["units.start a", "units.start b"]  # a was woken
    await life.drop()


@in_loop
async def test_a_model_serves_on_when_its_checkpoint_was_asked_for_and_failed(
    world: World, tmp_path: Path
) -> None:
    life = await begin_life(config_of(MODEL), world, str(tmp_path), MemoryStore())
    verbs = life.verbs()
    await verbs.answer(Ask(1, "load", {"model": "a"}))
    world.fail("checkpointer.dump", unharmed())
    with pytest.raises(LlmuxError, match=r"cannot checkpoint a: .*a socket of vLLM's hub"):
        await verbs.answer(Ask(2, "checkpoint", {"model": "a"}))
    assert life.state_of("a") == "serving"
    assert world.names("units.start") == ["units.start a"]
    await life.drop()


@in_loop
async def test_a_start_that_hangs_ends_with_the_order_to_unload(
    world: World, tmp_path: Path
) -> None:
    life = await begin_life(config_of(MODEL, model("b")), world, str(tmp_path), MemoryStore())
    hold = world.hold("engine.wait_healthy")
    life.demand("a", waiting=1)
    await hold.reached.wait()
    answer = await life.verbs().answer(Ask(1, "unload", {"model": "a"}))
    assert answer == {"message": "Model a is stopped"}
    assert world.engines == {}
    life.demand("b", waiting=1)
    await life.until_state("b", "serving")
    assert world.violations == []
    await life.drop()


@in_loop
async def test_a_start_that_hangs_while_its_unit_is_made_leaves_nothing(
    world: World, tmp_path: Path
) -> None:
    life = await begin_life(config_of(MODEL), world, str(tmp_path), MemoryStore())
    hold = world.hold("units.start")
    life.demand("a", waiting=1)
    await hold.reached.wait()
    await life.verbs().answer(Ask(1, "unload", {"model": "a"}))
    assert world.engines == {}
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    await life.drop()
