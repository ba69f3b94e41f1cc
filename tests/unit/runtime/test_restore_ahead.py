"""What of a restore needs no GPU is done while the victim is still leaving it; and nothing of it
stays when it is not wanted any more, wherever it was."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from runtime_harness import (
    OFFLOAD,
    STOP,
    Life,
    begin_life,
    config_of,
    in_loop,
    in_virtual_time,
    model,
)

from llmux.config.schema import Config, Eviction, Process, Weights
from llmux.core.effects import RestoreAhead
from llmux.core.events import ConfigChanged, LoadAsked, ParkAsked
from llmux.errors import Blame, CheckpointFailed
from llmux.runtime.engines import restore_ahead as ahead
from tests.twins.disk import MemoryStore
from tests.twins.world import GIB, Hold, World

CHECKPOINT = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
ACTS = ("checkpointer.restore", "engine.sleep", "cuda.resume", "units.kill")


@pytest.fixture
def runtime() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield directory


def config() -> Config:
    return config_of(model("a", eviction=CHECKPOINT), model("b", eviction=OFFLOAD))


@asynccontextmanager
async def living(
    world: World, runtime: str, store: MemoryStore | None = None
) -> AsyncIterator[Life]:
    """a is parked in an image, b serves."""
    life = await begin_life(config(), world, runtime, store or MemoryStore())
    for name in ("a", "b"):
        life.loop.post(LoadAsked(name))
        await life.until_state(name, "serving")
    assert life.state_of("a") == "parked"
    assert set(world.engines) == {"b"}
    world.calls.clear()
    yield life
    await life.drop()
    assert world.violations == []
    assert world.restoring == set()


async def switch_in_virtual_time(life: Life) -> None:
    """As ``living``; there its patience of a second would be over at once."""
    for name in ("a", "b"):
        life.loop.post(LoadAsked(name))
        await life.loop.wait_for(
            lambda s, name=name: s.models[name].state == "serving",  # type: ignore[misc]  # bound by a default
            100.0,
        )


async def ask(life: Life, world: World) -> Hold:
    """A request waits for a; b stands in its parking."""
    parking = world.hold("engine.sleep", model="b")
    life.demand("a", waiting=1)
    await parking.reached.wait()
    return parking


async def is_ahead(life: Life, world: World) -> None:
    """The preparation under way has come to its end."""
    task = life.loop.executor.ahead._engines["a"].task
    assert task is not None
    await asyncio.wait([task])
    assert set(world.engines) == {"a", "b"}


async def is_gone(life: Life, world: World) -> None:
    await life.loop.executor.ahead.dropped("a")
    assert set(world.engines) == {"b"}
    assert world.restoring == set()


def acts(world: World) -> list[str]:
    return world.names(*ACTS)


@in_loop
async def test_the_host_part_is_done_while_the_victim_parks_and_the_gpu_part_after(
    runtime: str,
) -> None:
    world = World()
    async with living(world, runtime) as life:
        parking = await ask(life, world)
        await is_ahead(life, world)
        assert world.used(0) == int(80 * GIB * 0.9), "all of it the victim's"
        assert life.state_of("a") == "parked"
        parking.release()
        await life.until_state("a", "serving")
        *host_part, last = acts(world)
        assert sorted(host_part) == ["checkpointer.restore a", "engine.sleep b"]
        assert last == "cuda.resume a"
        assert world.images["a"]


@in_loop
async def test_a_wake_that_comes_meanwhile_waits_for_it(runtime: str) -> None:
    world = World()
    async with living(world, runtime) as life:
        restoring = world.hold("checkpointer.restore")
        (await ask(life, world)).release()
        await restoring.reached.wait()
        await life.until_state("a", "waking")
        restoring.release()
        await life.until_state("a", "serving")
        assert acts(world).count("checkpointer.restore a") == 1


@in_loop
async def test_an_engine_whose_cuda_state_is_not_suspended_is_not_restored_ahead(
    runtime: str,
) -> None:
    """CRIU would bring its GPU memory back with it."""
    world = World()
    async with living(world, runtime) as life:
        image = world.images["a"]
        world.images["a"] = replace(image, recipe={**image.recipe, "cuda_pids": []})
        world.dumped[image.path].suspended = False
        world.dumped[image.path].held = {}
        parking = await ask(life, world)
        await settled(life)
        assert set(world.engines) == {"b"}
        parking.release()
        await life.until_state("a", "serving")
        assert acts(world) == ["engine.sleep b", "checkpointer.restore a"]


async def settled(life: Life) -> None:
    """No preparation is under way."""
    for engine in list(life.loop.executor.ahead._engines.values()):
        assert engine.task is not None
        await asyncio.wait([engine.task])


@pytest.mark.parametrize(("spare", "is_enough"), [(0, True), (-1, False)])
@in_loop
async def test_short_of_memory_it_waits_for_its_turn(
    runtime: str, spare: int, is_enough: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside it there must be room for what the victim moves into host memory."""
    caplog.set_level("INFO")
    world = World()
    async with living(world, runtime) as life:
        image = world.images["a"]
        world.memory_bytes = image.apparent_bytes + world.used(0) + ahead.HEADROOM_BYTES + spare
        parking = await ask(life, world)
        await settled(life)
        assert ("a" in world.engines) is is_enough
        assert ("a is not restored ahead" in caplog.text) is not is_enough
        parking.release()
        await life.until_state("a", "serving")
        lines = [record.message for record in caplog.records]
        assert lines.count("Restoring a from checkpoint") == 1
        assert lines.count("criu restore: success") == 1


@in_loop
async def test_a_failed_preparation_leaves_the_restore_to_the_wake(runtime: str) -> None:
    world = World()
    async with living(world, runtime) as life:
        world.fail(
            "checkpointer.restore", CheckpointFailed("restore", "a", "pid taken", blame=Blame.HOST)
        )
        parking = await ask(life, world)
        await settled(life)
        assert world.restoring == set()
        parking.release()
        await life.until_state("a", "serving")
        assert acts(world).count("checkpointer.restore a") == 2
        assert world.images["a"]


@pytest.mark.parametrize("awaited", [False, True], ids=["before the wake", "under the wake"])
@in_loop
async def test_a_bad_image_is_quarantined_and_the_start_is_cold(
    runtime: str, awaited: bool
) -> None:
    world = World()
    async with living(world, runtime) as life:
        restoring = world.hold("checkpointer.restore")
        parking = await ask(life, world)
        await restoring.reached.wait()
        bad = CheckpointFailed("restore", "a", "a byte differs", blame=Blame.IMAGE)
        if awaited:
            parking.release()
            await life.until_state("a", "waking")
            restoring.fail(bad)
        else:
            restoring.fail(bad)
            await settled(life)
            parking.release()
        await life.until_state("a", "serving")
        assert acts(world).count("checkpointer.restore a") == 1
        assert world.names("checkpointer.quarantine") == ["checkpointer.quarantine a"]
        assert life.quarantined == ["a"]
        assert world.names("units.start") == ["units.start a"]


@in_virtual_time
async def test_one_that_hangs_is_ended_by_its_deadline(runtime: str) -> None:
    world = World()
    life = await begin_life(config(), world, runtime, MemoryStore())
    await switch_in_virtual_time(life)
    world.hold("checkpointer.restore")
    world.hold("engine.sleep", model="b")
    life.demand("a", waiting=1)
    await life.loop.wait_for(lambda s: s.models["a"].state == "serving", 10_000.0)
    assert world.violations == []
    assert world.restoring == set()
    await life.drop()


# ---- not wanted any more ------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["under way", "waiting"])
@pytest.mark.parametrize("cause", ["client", "unload", "removed"])
@in_loop
async def test_what_is_not_wanted_any_more_is_gone(runtime: str, moment: str, cause: str) -> None:
    world = World()
    async with living(world, runtime) as life:
        restoring = world.hold("checkpointer.restore")
        parking = await ask(life, world)
        await restoring.reached.wait()
        if moment == "waiting":
            restoring.release()
            await is_ahead(life, world)
        match cause:
            case "client":
                life.demand("a")
            case "unload":
                life.demand("a")
                life.loop.post(ParkAsked("a", STOP))
            case "removed":
                life.loop.post(ConfigChanged(config_of(model("b"))))
        await life.until(lambda s: not s.reservations)
        await is_gone(life, world)
        parking.release()
        await life.settled()
        assert "a" not in world.engines
        assert world.images["a"], "the image stays usable"
        if cause != "removed":
            life.demand("a", waiting=1)
            await life.until_state("a", "serving")
            assert not world.names("units.start")


@in_loop
async def test_a_client_that_comes_back_during_the_drop_is_served(runtime: str) -> None:
    world = World()
    async with living(world, runtime) as life:
        parking = await ask(life, world)
        await is_ahead(life, world)
        killing = world.hold("units.kill", model="a")
        life.demand("a")
        await killing.reached.wait()
        life.demand("a", waiting=1)
        await life.until(lambda s: "a" in s.reservations)
        parking.release()
        await life.until_state("a", "waking")
        killing.release()
        await life.until_state("a", "serving")
        assert [act for act in acts(world) if act != "engine.sleep b"][-4:] == [
            "checkpointer.restore a",
            "units.kill a",
            "checkpointer.restore a",
            "cuda.resume a",
        ]


@in_loop
async def test_one_that_dies_while_it_waits_is_restored_once_more(runtime: str) -> None:
    world = World()
    async with living(world, runtime) as life:
        parking = await ask(life, world)
        await is_ahead(life, world)
        world.exit("a")
        await asyncio.sleep(0)
        parking.release()
        await life.until_state("a", "serving")
        assert acts(world).count("checkpointer.restore a") == 2
        assert not world.names("units.start")


@in_loop
async def test_one_that_cannot_be_killed_is_not_forgotten(runtime: str) -> None:
    """The unit is taken: the next operation ends it first."""
    world = World()
    async with living(world, runtime) as life:
        parking = await ask(life, world)
        await is_ahead(life, world)
        world.fail("units.kill", model="a")
        life.demand("a")
        await life.until(lambda s: not s.reservations)
        parking.release()
        await life.settled()
        assert "a" in world.engines
        life.demand("a", waiting=1)
        await life.until_state("a", "serving")
        assert acts(world).count("units.kill a") == 2


@in_loop
async def test_what_was_made_of_another_image_is_not_taken_over(runtime: str) -> None:
    """Its arguments were changed meanwhile: cold, and nothing of it in the way."""
    world = World()
    async with living(world, runtime) as life:
        parking = await ask(life, world)
        await is_ahead(life, world)
        changed = replace(model("a", eviction=CHECKPOINT), model_path="models/other")
        life.loop.post(ConfigChanged(config_of(changed, model("b"))))
        parking.release()
        await life.until_state("a", "serving")
        assert world.names("units.start") == ["units.start a"]
        assert acts(world).count("cuda.resume a") == 0


@in_virtual_time
async def test_nobody_waits_longer_than_a_request_may(runtime: str) -> None:
    world = World()
    life = await begin_life(config(), world, runtime, MemoryStore())
    await switch_in_virtual_time(life)
    config_a = life.loop.state.models["a"].config
    life.loop.executor.restore_ahead(RestoreAhead("a", config_a, (0,), (), 300.0))
    await is_ahead(life, world)
    await asyncio.sleep(301)  # of virtual time
    assert set(world.engines) == {"b"}
    assert world.restoring == set()
    await life.drop()


# ---- the supervisor ends ------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["under way", "waiting"])
@in_loop
async def test_a_supervisor_that_ends_leaves_nothing_restored_ahead(
    runtime: str, moment: str
) -> None:
    world = World()
    async with living(world, runtime) as life:
        restoring = world.hold("checkpointer.restore")
        await ask(life, world)
        await restoring.reached.wait()
        if moment == "waiting":
            restoring.release()
            await is_ahead(life, world)
    assert set(world.engines) == {"b"}
    assert world.images["a"]


@in_loop
async def test_after_a_supervisor_that_was_killed_the_next_one_ends_it(runtime: str) -> None:
    world, store = World(), MemoryStore()
    life = await begin_life(config(), world, runtime, store)
    for name in ("a", "b"):
        life.loop.post(LoadAsked(name))
        await life.until_state(name, "serving")
    await ask(life, world)
    await is_ahead(life, world)
    killed = world.hold("units.kill")  # it never gets so far
    closing = asyncio.ensure_future(life.drop())
    await killed.reached.wait()
    assert world.restoring == {"a"}
    life = await begin_life(config(), world, runtime, store)
    assert set(world.engines) == {"b"}
    assert world.restoring == set()
    assert life.state_of("a") == "stopped"
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    assert world.names("units.start") == ["units.start a", "units.start b"], "from its image"
    killed.fail(CheckpointFailed("kill", "a", "the dead do nothing"))
    await closing
    assert world.violations == []
    await life.drop()
