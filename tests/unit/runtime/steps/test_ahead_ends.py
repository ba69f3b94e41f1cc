"""The end of an engine restored ahead: whose timer ends it, what is waited for, what is said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivers_called import ADDRESS, CHECKPOINT, CONFIG, HANDLE, Bench
from runtime_harness import Shop, in_loop, in_virtual_time, model

from llmux.core.effects import RestoreAhead
from llmux.core.plans import Outcome, park_plan, start_plan, wake_plan
from llmux.errors import LlmuxError
from llmux.image_ports import Image
from llmux.runtime.engines.facts import EngineFacts, Recipe
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.restore_ahead import AheadRestorer
from tests.twins.world import World

IMAGE = Image(
    model="a", path="/i/a", identity={"model": "m"}, created=1.0, dump_seconds=2.0, root_pid=77,
    recipe=Recipe(CHECKPOINT, EngineFacts(address=ADDRESS, cuda_pids=(7,))).to_json(),
    apparent_bytes=6, disk_bytes=5,
)  # fmt: skip
ORDER = RestoreAhead("a", CONFIG, (0,), (), 500.0)


class Ahead(Bench):
    def __init__(self, checkpointer: Any = None, **answers: Any) -> None:
        super().__init__(checkpointer_find=IMAGE, checkpointer_restore=HANDLE, **answers)
        if checkpointer is not None:
            self.without(checkpointer=checkpointer)
        self.images = ImageLifecycle(self.drivers, self.told.append, lambda _: None)
        self.restorer = AheadRestorer(self.drivers, self.images)
        self.spec = self.images.spec(CONFIG, (0,))

    def count(self, name: str) -> int:
        return [call[0] for call in self.seen].count(name)


class Restoring:
    """A checkpointer whose restore takes ``seconds``, and a moment to undo itself."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = asyncio.Event()
        self.undone: list[str] = []

    async def find(self, *_: Any) -> Image:
        return IMAGE

    async def shm_names(self, *_: Any) -> tuple[str, ...]:
        return ()

    async def restore(self, *_: Any) -> Any:
        self.began.set()
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            for _turn in range(5):
                await asyncio.sleep(0)
            self.undone.append("a")
            raise
        return HANDLE


def take(bench: Ahead) -> Any:
    return bench.restorer.take(IMAGE, bench.spec)


@pytest.mark.parametrize("end", [take, lambda bench: bench.restorer.dropped("a")])
@in_virtual_time
async def test_the_time_of_a_former_order_ends_no_later_one(end: Callable[[Ahead], Any]) -> None:
    bench = Ahead()
    bench.restorer.begin(ORDER, [])
    await asyncio.sleep(300.0)
    await end(bench)
    ended = bench.count("units.kill")
    bench.restorer.begin(ORDER, [])
    await asyncio.sleep(300.0)
    assert bench.count("checkpointer.restore") == 2
    assert bench.count("units.kill") == ended
    await asyncio.sleep(300.0)
    assert bench.count("units.kill") == ended + 1


@in_virtual_time
async def test_an_order_that_a_wake_waits_for_has_no_time_of_its_own() -> None:
    bench = Ahead(Restoring(40.0))
    bench.restorer.begin(replace(ORDER, deadline=10.0), [])
    assert await bench.restorer.take(IMAGE, bench.spec) == HANDLE


@in_loop
async def test_one_is_gone_when_its_restore_has_undone_itself() -> None:
    checkpointer = Restoring(1e6)
    bench = Ahead(checkpointer)
    bench.restorer.begin(ORDER, [])
    await checkpointer.began.wait()
    await bench.restorer.dropped("a")
    assert checkpointer.undone == ["a"]
    assert bench.count("units.kill") == 0


@in_virtual_time
async def test_one_that_waits_is_heard_and_watched_until_it_is_taken() -> None:
    bench = Ahead()
    bench.restorer.begin(ORDER, [])
    await asyncio.sleep(1.0)
    assert [call[:2] for call in bench.seen if call[0] in ("output.attach", "units.watch")] == [
        ("output.attach", HANDLE), ("units.watch", HANDLE),
    ]  # fmt: skip
    bench.seen.clear()
    assert await take(bench) == HANDLE
    assert bench.seen == [("units.unwatch", HANDLE)]


@in_virtual_time
async def test_only_one_that_ended_is_said_to_be_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dropped = "a: what was restored ahead is dropped"
    bench = Ahead()
    bench.answers["units.kill"] = LlmuxError("it stays")
    bench.restorer.begin(ORDER, [])
    await asyncio.sleep(1.0)
    bench.restorer.drop("a")
    await asyncio.sleep(1.0)
    assert "cannot end a, restored ahead: it stays" in caplog.messages
    assert dropped not in caplog.messages
    bench = Ahead()
    bench.restorer.begin(ORDER, [])
    await asyncio.sleep(1.0)
    await bench.restorer.dropped("a")
    assert caplog.messages.count(dropped) == 1


# ---- in operations -------------------------------------------------------------------------------

MODEL = model("a", eviction=CHECKPOINT)


async def parked_and_ahead(world: World, tmp_path: Path) -> Shop:
    """The image of the model is on disk, and its engine restored ahead from there."""
    shop = Shop(world, str(tmp_path))
    assert (await shop.run(MODEL, start_plan(MODEL, 60.0))).outcome is Outcome.UP
    assert (await shop.run(MODEL, park_plan(MODEL, CHECKPOINT))).outcome is Outcome.PARKED
    shop.executor.restore_ahead(RestoreAhead("a", MODEL, (0,), (), 500.0))
    task = shop.executor.ahead._engines["a"].task
    assert task is not None and await task is not None
    assert set(world.engines) == {"a"}
    world.calls.clear()
    return shop


@in_loop
async def test_a_start_ends_what_was_restored_ahead_first(tmp_path: Path) -> None:
    world = World()
    shop = await parked_and_ahead(world, tmp_path)
    assert (await shop.run(MODEL, start_plan(MODEL, 60.0))).outcome is Outcome.UP
    assert world.names("units.kill", "units.start") == ["units.kill a", "units.start a"]
    assert (world.violations, world.restoring) == ([], set())


@in_loop
async def test_a_wake_that_fails_before_it_took_it_leaves_none(tmp_path: Path) -> None:
    world = World()
    shop = await parked_and_ahead(world, tmp_path)
    world.fail("checkpointer.find")
    ended = await shop.run(MODEL, wake_plan(MODEL, CHECKPOINT))
    assert ended.outcome is Outcome.DOWN
    assert (world.engines, world.restoring) == ({}, set())


@in_loop
async def test_an_executor_that_closes_ends_it(tmp_path: Path) -> None:
    world = World()
    shop = await parked_and_ahead(world, tmp_path)
    await shop.executor.close()
    assert (world.engines, world.restoring) == ({}, set())
