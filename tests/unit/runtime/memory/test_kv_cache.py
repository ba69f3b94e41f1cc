"""A retained engine gives up its KV cache before its CUDA state goes into host memory or an image,
and has it again before it is asked anything."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from runtime_harness import Shop, begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.events import LoadAsked, ParkAsked
from llmux.core.plans import Outcome, park_plan, start_plan, stop_plan, wake_plan
from llmux.errors import CheckpointFailed, EngineUnhealthy, TreeState
from tests.twins.disk import MemoryStore
from tests.twins.world import GIB, World

SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
CHECKPOINT = Eviction(Weights.RETAIN, Process.CHECKPOINT)
MODEL = model("a", eviction=SUSPEND, extra_args=("--enable-sleep-mode",))
CALLS = ("engine.reset_prefix_cache", "engine.discard_cache", "engine.return_cache")
KEPT = 9 * GIB  # context and weights


async def parked(shop: Shop, eviction: Eviction) -> None:
    assert (await shop.run(MODEL, start_plan(MODEL, 60.0))).outcome is Outcome.UP
    assert (await shop.run(MODEL, park_plan(MODEL, eviction))).outcome is Outcome.PARKED


async def woken(shop: Shop, eviction: Eviction) -> None:
    assert (await shop.run(MODEL, wake_plan(MODEL, eviction))).outcome is Outcome.UP
    assert shop.world.used(0) == int(80 * GIB * 0.9)
    assert (await shop.run(MODEL, stop_plan(MODEL))).outcome is Outcome.DOWN
    assert shop.world.violations == []


@pytest.mark.parametrize("eviction", [SUSPEND, CHECKPOINT], ids=str)
@in_loop
async def test_it_is_gone_while_parked_and_there_before_the_canary(
    tmp_path: Path, eviction: Eviction
) -> None:
    shop = Shop(World(), str(tmp_path))
    await parked(shop, eviction)
    assert shop.world.names(*CALLS) == [f"{call} a" for call in CALLS[:2]]
    assert shop.executor.instances["a"].facts.cuda_bytes == KEPT
    await woken(shop, eviction)
    assert shop.world.names(*CALLS)[2:] == ["engine.return_cache a"]


@in_loop
async def test_an_image_says_that_its_engine_has_none(tmp_path: Path) -> None:
    world = World()
    await parked(Shop(world, str(tmp_path)), CHECKPOINT)
    await woken(Shop(world, str(tmp_path)), CHECKPOINT)


@in_loop
async def test_a_version_that_cannot_is_not_asked(tmp_path: Path) -> None:
    world = World()
    world.version = "0.31.1"
    shop = Shop(world, str(tmp_path))
    await parked(shop, SUSPEND)
    assert "discard_cache" not in dict(shop.phases), "nothing is told of that was not done"
    await woken(shop, SUSPEND)
    assert world.names(*CALLS) == []


@in_loop
async def test_only_what_is_done_is_told_of(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    shop.world.fail("engine.discard_cache", EngineUnhealthy("discard", "a", "404", status=404))
    await parked(shop, SUSPEND)
    assert ("discard_cache", "failed") in shop.phases
    woke = await shop.run(MODEL, wake_plan(MODEL, SUSPEND))
    assert woke.outcome is Outcome.UP
    assert "cuda_resume" in dict(shop.phases)
    assert "return_cache" not in dict(shop.phases), "it had kept its cache"
    assert (await shop.run(MODEL, stop_plan(MODEL))).outcome is Outcome.DOWN
    assert "leave_gpu" in dict(shop.phases), "its CUDA state was resumed"
    assert (await shop.run(MODEL, start_plan(MODEL, 60.0))).outcome is Outcome.UP
    assert (await shop.run(MODEL, stop_plan(MODEL))).outcome is Outcome.DOWN
    assert "leave_gpu" not in dict(shop.phases), "it never left the GPU"


@in_loop
async def test_where_the_route_is_refused_it_keeps_its_cache(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    shop.world.fail("engine.discard_cache", EngineUnhealthy("discard", "a", "404", status=404))
    await parked(shop, SUSPEND)
    assert shop.executor.instances["a"].facts.cuda_bytes == int(80 * GIB * 0.9)
    await woken(shop, SUSPEND)
    assert "engine.return_cache a" not in shop.world.names(*CALLS)


@in_loop
async def test_what_a_failed_call_unmapped_is_mapped_again(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    shop.world.fail("engine.discard_cache", EngineUnhealthy("discard", "a", "500", status=500))
    await parked(shop, SUSPEND)
    await woken(shop, SUSPEND)
    assert shop.world.names("engine.return_cache") == ["engine.return_cache a"]


@in_loop
async def test_blocks_that_are_still_in_use_keep_the_cache(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    shop.world.fail("engine.reset_prefix_cache", EngineUnhealthy("reset", "a", "in use"))
    await parked(shop, SUSPEND)
    assert shop.world.names("engine.discard_cache") == []
    await woken(shop, SUSPEND)


@in_loop
async def test_a_cache_that_does_not_come_back_ends_the_wake(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    await parked(shop, SUSPEND)
    shop.world.fail("engine.return_cache")
    assert (await shop.run(MODEL, wake_plan(MODEL, SUSPEND))).outcome is Outcome.DOWN
    assert (shop.world.engines, shop.world.hung_hosts) == ({}, [])


@in_loop
async def test_without_an_image_and_without_a_suspend_it_cannot_stay(tmp_path: Path) -> None:
    """What it would be parked by then has no step that returns the cache."""
    shop = Shop(World(), str(tmp_path), cuda=None)
    assert (await shop.run(MODEL, start_plan(MODEL, 60.0))).outcome is Outcome.UP
    error = CheckpointFailed("checkpoint", "a", "no room", tree=TreeState.RUNNING)
    shop.world.fail("checkpointer.dump", error)
    ended = await shop.run(MODEL, park_plan(MODEL, CHECKPOINT))
    assert (ended.outcome, shop.world.engines) == (Outcome.DOWN, {})


@pytest.mark.parametrize("crash", ["parked", "suspending"])
@in_loop
async def test_the_next_supervisor_returns_it(crash: str) -> None:
    world, store = World(), MemoryStore()
    config = config_of(MODEL)
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config, world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        if crash == "suspending":
            hold = world.hold("freezer.freeze")
            life.loop.post(ParkAsked("a"))
            await hold.reached.wait()
        else:
            life.loop.post(ParkAsked("a"))
            await life.until_state("a", "parked")
        await life.drop()
        life = await begin_life(config, world, runtime, store)
        await life.until_state("a", "parked")
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        assert world.names("engine.return_cache") == ["engine.return_cache a"]
        assert world.used(0) == int(80 * GIB * 0.9)
        assert world.violations == []
        await life.drop()
