"""What status says of an operation under way, of memory and of use."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from runtime_harness import Life, begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction
from llmux.core.events import ImageKnown, LoadAsked
from llmux.protocol import Ask
from llmux.runtime.control.holdings import Holdings
from tests.twins.disk import MemoryStore
from tests.twins.world import GIB, World


@asynccontextmanager
async def life_on(world: World) -> AsyncIterator[Life]:
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a"), model("b")), world, runtime, MemoryStore())
        try:
            yield life
        finally:
            await life.drop()


async def status_of(life: Life, name: str) -> dict[str, Any]:
    found = (await life.verbs().answer(Ask(1, "status")))["models"][name]
    assert isinstance(found, dict)
    return found


@in_loop
async def test_a_start_shows_its_stage_by_the_engines_own_lines() -> None:
    world = World()
    async with life_on(world) as life:
        held = world.hold("engine.wait_healthy")
        life.loop.post(LoadAsked("a"))
        await held.reached.wait()
        one = await status_of(life, "a")
        assert (one["phase"], one["progress"]) == ("wait_healthy", None)
        assert one["usual_secs"] is None, "never measured"
        life.executor.heard("a", "INFO [gpu_model_runner.py:1] Starting to load model x...")
        life.executor.heard("a", "Loading safetensors checkpoint shards: 25% Completed | 1/4 [")
        one = await status_of(life, "a")
        assert (one["phase"], one["phase_text"]) == ("load_weights", "loading weights")
        assert one["progress"] == {"done": 1, "total": 4, "unit": "shards"}
        assert one["phase_secs"] >= 0
        life.executor.heard("a", "INFO: a line that names no stage")
        assert (await status_of(life, "a"))["progress"]["done"] == 1
        held.release()
        await life.until_state("a", "serving")
        one = await status_of(life, "a")
        assert (one["phase"], one["progress"], one["left_secs"]) == (None, None, None)
        assert one["usual_start_secs"] > 0
        life.executor.heard("a", "INFO [x.py:1] torch.compile took 1 s: of a request")
        assert (await status_of(life, "a"))["phase"] is None


@in_loop
async def test_the_usual_duration_and_what_is_left_come_from_earlier_starts() -> None:
    world = World()
    async with life_on(world) as life:
        await life.verbs().answer(Ask(1, "load", {"model": "a"}))
        await life.verbs().answer(Ask(1, "unload", {"model": "a"}))
        usual = (await status_of(life, "a"))["usual_start_secs"]
        held = world.hold("units.start")
        life.loop.post(LoadAsked("a"))
        await held.reached.wait()
        one = await status_of(life, "a")
        assert one["usual_secs"] == usual
        assert one["left_secs"] is None or 0 < one["left_secs"] <= usual
        held.release()
        await life.settled()


@in_loop
async def test_memory_is_that_of_engines_which_live() -> None:
    world = World()
    async with life_on(world) as life:
        await life.verbs().answer(Ask(1, "load", {"model": "a"}))
        one, other = await status_of(life, "a"), await status_of(life, "b")
        assert one["gpu_bytes"] == world.used(0) > 0
        assert one["ram_bytes"] == GIB
        assert (other["gpu_bytes"], other["ram_bytes"]) == (None, None)


@in_loop
async def test_a_blind_or_hanging_observer_costs_the_numbers_and_not_the_answer() -> None:
    world = World()
    async with life_on(world) as life:
        await life.verbs().answer(Ask(1, "load", {"model": "a"}))
        world.fail("gpu.look")
        one = await status_of(life, "a")
        assert (one["gpu_bytes"], one["ram_bytes"]) == (None, GIB)
        held = world.hold("gpu.look")
        holdings = Holdings(life.drivers, life.executor.instances)
        asking = asyncio.gather(holdings.now(), holdings.now())
        await held.reached.wait()
        assert list(await asking) == [{}, {}], "asked once, and answered with what is known"
        held.release()
        assert (await holdings.now())["a"].ram == GIB


@in_loop
async def test_use_and_images_are_named() -> None:
    world = World()
    async with life_on(world) as life:
        assert (await status_of(life, "a"))["idle_secs"] is None, "never used"
        life.demand("a", waiting=1)
        await life.until_state("a", "serving")
        await life.settled()
        assert (await status_of(life, "a"))["idle_secs"] >= 0
        life.demand("a", in_flight=1)
        await life.until(lambda state: state.in_flight("a") == 1)
        assert (await status_of(life, "a"))["idle_secs"] == 0
        life.loop.post(ImageKnown("a", Eviction.parse("offload+checkpoint")))
        await life.settled()
        assert (await status_of(life, "a"))["image"] == "offload+checkpoint"
        assert (await status_of(life, "a"))["pinned"] is False
        life.demand("a")


@in_loop
async def test_the_memory_of_each_gpu_is_shown_with_the_part_of_our_engines() -> None:
    world = World()
    async with life_on(world) as life:
        await life.verbs().answer(Ask(1, "load", {"model": "a"}))
        status = await life.verbs().answer(Ask(2, "status", {}))
        held = world.used(0)
        assert status["gpus"][0] == {
            "index": 0, "total_bytes": world.gpu_bytes[0], "used_bytes": held,
            "engines_bytes": held,
        }  # fmt: skip
        for error in (None, OSError(5, "Input/output error")):
            world.fail("gpu.look", error)
            holdings = Holdings(life.drivers, life.executor.instances)
            seen = await holdings.now()
            assert holdings.gpus == (), "not seen is not empty"
            assert seen["a"].gpu is None and seen["a"].ram, "the rest is seen"


@in_loop
async def test_an_engine_whose_memory_cannot_be_seen_hides_no_other(tmp_path: Path) -> None:
    world = World()
    life = await begin_life(
        config_of(*(model(name, gpu_memory=0.3) for name in "abc")),
        world,
        str(tmp_path),
        MemoryStore(),
    )
    for number, name in enumerate("abc"):
        await life.verbs().answer(Ask(number, "load", {"model": name}))
    world.fail("units.memory_bytes", OSError(19, "No such device"), model="b", always=True)
    holdings = Holdings(life.drivers, life.executor.instances)
    assert set(await holdings.now()) == {"a", "c"}
    await life.drop()
