"""An engine whose CUDA state was resumed is suspended again before it ends.

Killed with that state on the GPU it may hang the whole host (cuda-checkpoint#53).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from runtime_harness import Shop, begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.events import LoadAsked, ParkAsked
from llmux.core.plans import (
    Outcome,
    Plan,
    park_plan,
    reuse_plan,
    start_plan,
    stop_plan,
    wake_plan,
)
from llmux.errors import CheckpointFailed, EngineUnhealthy
from tests.twins.disk import MemoryStore
from tests.twins.world import World

SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
FREEZE = Eviction(Weights.RETAIN, Process.FREEZE)
MODEL = model("a")
RETAINED = model("a", eviction=SUSPEND)
ENDS = [
    pytest.param(stop_plan(MODEL, grace=True), id="stop"),
    pytest.param(stop_plan(MODEL, grace=False), id="kill"),
]


async def resumed(shop: Shop, eviction: Eviction) -> None:
    for plan in (start_plan(MODEL, 60.0), park_plan(MODEL, eviction), wake_plan(MODEL, eviction)):
        ended = await shop.run(MODEL, plan)
        assert ended.outcome in (Outcome.UP, Outcome.PARKED), ended


@pytest.mark.parametrize("eviction", [SUSPEND, CHECKPOINT], ids=str)
@pytest.mark.parametrize("end", ENDS)
@in_loop
async def test_it_leaves_the_gpu_first(tmp_path: Path, eviction: Eviction, end: Plan) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await resumed(shop, eviction)
    assert world.engines["a"].restored
    assert (await shop.run(MODEL, end)).outcome is Outcome.DOWN
    assert world.engines == {}
    assert world.hung_hosts == []
    assert world.violations == []


LEAVING = ("engine.sleep", "cuda.check_memory", "cuda.suspend")
WELL = [
    pytest.param(stop_plan(MODEL), id="stop"),
    pytest.param(reuse_plan(MODEL, CHECKPOINT), id="its image is there already"),
    pytest.param(park_plan(MODEL, Eviction(Weights.DISCARD, Process.STOP)), id="parked by stop"),
]


@pytest.mark.parametrize("end", WELL)
@in_loop
async def test_what_nobody_needs_again_is_not_copied_to_host_memory(
    tmp_path: Path, end: Plan
) -> None:
    """Seen on an H200: the next model waited 1.9 s for 2 GiB of weights and cache on their way to
    host memory, and 0.5 s with the engine asleep."""
    world = World()
    shop = Shop(world, str(tmp_path))
    await resumed(shop, CHECKPOINT)
    context, before = world.engines["a"].used["context"], len(world.calls)
    assert (await shop.run(MODEL, end)).outcome in (Outcome.DOWN, Outcome.PARKED)
    calls = [call for call in world.calls[before:] if call.operation in LEAVING]
    assert [(call.operation, *call.args) for call in calls] == [
        ("engine.sleep", 2),
        ("cuda.check_memory", context),
        ("cuda.suspend",),
    ]
    assert (world.hung_hosts, world.violations) == ([], [])


@pytest.mark.parametrize(
    "fault", [EngineUnhealthy("sleep", "a", "500"), TimeoutError(), OSError("reset")], ids=repr
)
@in_loop
async def test_one_that_does_not_sleep_leaves_awake(tmp_path: Path, fault: Exception) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await resumed(shop, CHECKPOINT)
    world.fail("engine.sleep", fault)
    assert (await shop.run(MODEL, stop_plan(MODEL))).outcome is Outcome.DOWN
    assert world.names("cuda.suspend")
    assert (world.hung_hosts, world.violations) == ([], [])


@pytest.mark.parametrize(
    ("end", "config"),
    [
        pytest.param(stop_plan(MODEL, grace=False), MODEL, id="it failed: it may answer nothing"),
        pytest.param(stop_plan(RETAINED), RETAINED, id="it has no sleep mode"),
    ],
)
@in_loop
async def test_one_that_may_not_be_able_is_not_asked_to_sleep(
    tmp_path: Path, end: Plan, config: ModelConfig
) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    for plan in (start_plan(config, 60.0), park_plan(config, SUSPEND), wake_plan(config, SUSPEND)):
        await shop.run(config, plan)
    assert (await shop.run(config, end)).outcome is Outcome.DOWN
    assert world.names("engine.sleep") == []
    assert world.hung_hosts == []


@in_loop
async def test_a_frozen_one_is_thawed_for_that(tmp_path: Path) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await resumed(shop, SUSPEND)
    assert (await shop.run(MODEL, park_plan(MODEL, FREEZE))).outcome is Outcome.PARKED
    assert (await shop.run(MODEL, stop_plan(MODEL, grace=True))).outcome is Outcome.DOWN
    assert (world.hung_hosts, world.violations) == ([], [])


@in_loop
async def test_one_that_cannot_is_killed_all_the_same(tmp_path: Path) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await resumed(shop, SUSPEND)
    world.fail("cuda.suspend", CheckpointFailed("suspend", "a", "not enough host memory"))
    assert (await shop.run(MODEL, stop_plan(MODEL, grace=True))).outcome is Outcome.DOWN
    assert world.engines == {}
    assert world.hung_hosts == ["a"], "the twin notices"


@in_loop
async def test_one_that_never_was_resumed_is_not_suspended(tmp_path: Path) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    assert (await shop.run(MODEL, stop_plan(MODEL, grace=True))).outcome is Outcome.DOWN
    assert world.names("cuda.suspend") == []


@pytest.mark.parametrize(
    ("eviction", "awake"),
    [
        pytest.param(SUSPEND, True, id="awake"),
        # The former supervisor had resumed the engine, and noted nothing of that yet.
        pytest.param(SUSPEND, False, id="waking, suspended"),
        pytest.param(CHECKPOINT, False, id="waking, from an image"),
    ],
)
@in_loop
async def test_the_next_supervisor_knows(eviction: Eviction, awake: bool) -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a", eviction=eviction))
        life = await begin_life(config, world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        life.loop.post(ParkAsked("a"))
        await life.until_state("a", "parked")
        hold = None if awake else world.hold("engine.wait_healthy")
        life.demand("a", waiting=1)
        if hold is None:
            await life.until_state("a", "serving")
        else:
            await hold.reached.wait()
        assert world.engines["a"].restored
        await life.drop()
        life = await begin_life(config_of(model("b")), world, runtime, store)
        await life.until(lambda state: set(state.models) == {"b"})
        assert world.engines == {}
        assert world.hung_hosts == []
        await life.drop()


@in_loop
async def test_a_wake_is_taken_up_without_harm(tmp_path: Path) -> None:
    world, store = World(), MemoryStore()
    config = config_of(model("a", eviction=CHECKPOINT))
    life = await begin_life(config, world, str(tmp_path), store)
    life.loop.post(LoadAsked("a"))
    await life.until_state("a", "serving")
    life.loop.post(ParkAsked("a"))
    await life.until_state("a", "parked")
    hold = world.hold("engine.wait_healthy")
    life.demand("a", waiting=1)
    await hold.reached.wait()
    await life.drop()
    life = await begin_life(config, world, str(tmp_path), store)
    await life.until_state("a", "serving")
    assert world.hung_hosts == []
    assert world.violations == []
    await life.drop()


@in_loop
async def test_a_resume_that_fails_half_way_leaves_the_gpu(tmp_path: Path) -> None:
    """Some of its processes have their state back when another's cannot be restored."""
    world = World()
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    await shop.run(MODEL, park_plan(MODEL, SUSPEND))
    world.engines["a"].suspended, world.engines["a"].restored = False, True
    world.fail("cuda.resume", CheckpointFailed("resume", "a", "unlock: unknown error"))
    assert (await shop.run(MODEL, wake_plan(MODEL, SUSPEND))).outcome is Outcome.DOWN
    assert world.hung_hosts == []
