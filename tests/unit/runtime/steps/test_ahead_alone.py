"""An engine restored ahead, alone: who gets it, what ends it, and with which calls."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest
from drivers_called import ADDRESS, CHECKPOINT, CONFIG, HANDLE, Bench
from runtime_harness import in_loop, in_virtual_time

from llmux.core.effects import RestoreAhead
from llmux.core.plans import KILL_SECS
from llmux.errors import Blame, CheckpointFailed, LlmuxError
from llmux.image_ports import Image, NoImage
from llmux.ports import GpuProcess
from llmux.runtime.engines.facts import EngineFacts, Recipe
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.restore_ahead import HEADROOM_BYTES, AheadRestorer

FACTS = EngineFacts(address=ADDRESS, cuda_pids=(7,))
IMAGE = Image(
    model="a", path="/i/a", identity={"model": "m"}, recipe=Recipe(CHECKPOINT, FACTS).to_json(),
    created=1.0, dump_seconds=2.0, root_pid=77, apparent_bytes=6_000_000_000, disk_bytes=5,
)  # fmt: skip


class Ahead(Bench):
    def __init__(self, **answers: Any) -> None:
        found = {"checkpointer_find": IMAGE, "checkpointer_restore": HANDLE}
        super().__init__(**(found | answers))
        self.images = ImageLifecycle(self.drivers, self.told.append, lambda _: None)
        self.restorer = AheadRestorer(self.drivers, self.images)
        self.order = RestoreAhead("a", CONFIG, (0,), (), 500.0)

    def names(self) -> list[str]:
        return [call[0] for call in self.seen]


@in_virtual_time
async def test_an_engine_restored_ahead_is_taken_by_just_its_wake() -> None:
    spec = Ahead().images.spec(CONFIG, (0,))
    for image, launch, taken in (
        (IMAGE, spec, True), (replace(IMAGE, created=2.0), spec, False),
        (replace(IMAGE, path="/x"), spec, False), (IMAGE, replace(spec, argv=("x",)), False),
    ):  # fmt: skip
        bench = Ahead()
        bench.restorer.begin(bench.order, [])
        bench.restorer.begin(bench.order, [])
        handle = await bench.restorer.take(image, launch)
        assert handle == (HANDLE if taken else None)
        assert bench.names().count("checkpointer.restore") == 1
        restore = next(call for call in bench.seen if call[0] == "checkpointer.restore")
        assert restore[1:] == (IMAGE, spec, 180.0, HEADROOM_BYTES)
        assert bench.names().count("units.unwatch") == 1
        if not taken:
            end = bench.seen[-6:]
            assert end == [
                ("units.unwatch", HANDLE), ("checkpointer.shm_names", HANDLE),
                ("units.kill", HANDLE, KILL_SECS), ("checkpointer.remove_shm", "a", ("x",)),
                ("checkpointer.confirm_restore", "a"), ("output.detach", "a"),
            ]  # fmt: skip
        assert await bench.restorer.take(image, launch) is None
        await bench.restorer.close()


@pytest.mark.parametrize(
    "found", [NoImage("x"), replace(IMAGE, recipe={}),
              replace(IMAGE, recipe=Recipe(CHECKPOINT, EngineFacts()).to_json())]
)  # fmt: skip
@in_virtual_time
async def test_what_would_take_gpu_memory_at_once_is_not_restored_ahead(found: Any) -> None:
    bench = Ahead(checkpointer_find=found)
    bench.restorer.begin(bench.order, [])
    assert await bench.restorer.take(IMAGE, bench.images.spec(CONFIG, (0,))) is None
    assert "checkpointer.restore" not in bench.names()


@in_virtual_time
async def test_what_is_not_taken_in_time_is_ended() -> None:
    bench = Ahead()
    bench.restorer.begin(bench.order, [])
    await asyncio.sleep(400.0)
    assert "units.kill" not in bench.names()
    await asyncio.sleep(200.0)
    assert bench.names().count("units.kill") == 1
    await bench.restorer.close()
    assert bench.names().count("units.kill") == 1


@in_virtual_time
async def test_host_memory_is_kept_for_what_is_on_its_way_there() -> None:
    """What units that leave hold on their GPUs, and other engines that are restored just now."""
    bench, kept = Ahead(gpu_available=True), list[int]()
    bench.answers["gpu.processes"] = [GpuProcess(0, 77, 5), GpuProcess(1, 9, 7)]

    class Slow:
        async def find(self, *_: Any) -> Image:
            return IMAGE

        async def restore(self, *given: Any) -> None:
            kept.append(given[3])
            await asyncio.Event().wait()

    checkpointer: Any = Slow()
    restorer = AheadRestorer(replace(bench.drivers, checkpointer=checkpointer), bench.images)
    for name, leaving in (("a", [HANDLE]), ("b", [])):
        restorer.begin(RestoreAhead(name, replace(CONFIG, name=name), (0,), (), 500.0), leaving)
        await asyncio.sleep(0.1)
        assert ("output.paths", name) in bench.seen
    assert kept == [HEADROOM_BYTES + 5, HEADROOM_BYTES + IMAGE.apparent_bytes]
    await restorer.close()


@in_virtual_time
async def test_a_former_one_is_gone_before_the_next_is_restored() -> None:
    bench = Ahead()
    bench.restorer.begin(bench.order, [])
    await asyncio.sleep(1.0)
    bench.restorer.drop("a")
    bench.restorer.begin(bench.order, [])
    await asyncio.sleep(1.0)
    calls = ("checkpointer.restore", "units.kill", "output.detach")
    assert [name for name in bench.names() if name in calls] == [
        "checkpointer.restore", "units.kill", "output.detach", "checkpointer.restore",
    ]  # fmt: skip
    await bench.restorer.close()


@in_virtual_time
async def test_a_restore_that_hangs_or_names_that_cannot_be_seen_are_no_fault_of_the_wake(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    spec = Ahead().images.spec(CONFIG, (0,))
    bench = Ahead(checkpointer_restore=TimeoutError())
    bench.restorer.begin(bench.order, [])
    assert await bench.restorer.take(IMAGE, spec) is None
    assert "not done after 180 s" in caplog.messages[-1]
    for error in (LlmuxError("it is odd"), OSError(13, "Permission denied")):
        bench = Ahead(checkpointer_shm_names=error)
        bench.restorer.begin(bench.order, [])
        assert await bench.restorer.take(IMAGE, spec) == HANDLE


@in_virtual_time
async def test_the_death_of_a_former_engine_ends_none() -> None:
    bench = Ahead()
    bench.restorer.begin(bench.order, [])
    await asyncio.sleep(1.0)
    (died,) = [call[2] for call in bench.seen if call[0] == "units.watch"]
    for handle, ends in ((replace(HANDLE, pid=99), 0), (HANDLE, 1), (HANDLE, 1)):
        died(handle, "exit status 1")
        await asyncio.sleep(1.0)
        assert bench.names().count("units.kill") == ends
    await bench.restorer.close()


@in_loop
async def test_a_wake_that_is_given_up_ends_the_restore_and_sees_its_end() -> None:
    bench, began, undone = Ahead(), asyncio.Event(), list[str]()

    class SlowToUndo:
        """As a restore of CRIU's, which kills what there is of the tree."""

        async def find(self, *_: Any) -> Image:
            return IMAGE

        async def restore(self, *_: Any) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                for _turn in range(5):
                    await asyncio.sleep(0)
                undone.append("a")

    checkpointer: Any = SlowToUndo()
    restorer = AheadRestorer(replace(bench.drivers, checkpointer=checkpointer), bench.images)
    restorer.begin(bench.order, [])
    taking = asyncio.create_task(restorer.take(IMAGE, bench.images.spec(CONFIG, (0,))))
    await began.wait()
    taking.cancel()
    await asyncio.wait([taking])
    assert taking.cancelled() and undone == ["a"]


@pytest.mark.parametrize(
    "error", [LlmuxError("it is odd"), OSError(28, "No space left on device")], ids=str
)
@in_loop
async def test_what_cannot_be_restored_ahead_or_ended_is_said_once_and_tried_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    spec = Ahead().images.spec(CONFIG, (0,))
    bench = Ahead(checkpointer_restore=error)
    bench.restorer.begin(bench.order, [])
    assert await bench.restorer.take(IMAGE, spec) is None
    assert caplog.messages == [f"a is not restored ahead: {error}"]
    bench = Ahead()
    bench.answers["units.kill"] = error
    bench.restorer.begin(bench.order, [])
    other = replace(IMAGE, path="/x")
    with pytest.raises(type(error)):
        await bench.restorer.take(other, spec)
    assert f"cannot end a, restored ahead: {error}" in caplog.messages
    del bench.answers["units.kill"]
    assert await bench.restorer.take(other, spec) is None
    assert bench.names().count("units.kill") == 3


@in_loop
async def test_a_bad_image_that_nobody_asks_for_is_no_task_without_an_owner() -> None:
    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: unhandled.append(told))
    bad = CheckpointFailed("restore", "a", "pages-1.img differs", blame=Blame.IMAGE)
    bench = Ahead(checkpointer_restore=bad, checkpointer_quarantine="/q")
    bench.restorer.begin(bench.order, [])
    task = bench.restorer._engines["a"].task
    assert task is not None
    await asyncio.wait([task])
    assert "checkpointer.quarantine" in bench.names()
    await bench.restorer.close()
    bench.answers.clear()
    del task, bad  # what its traceback is held by
    gc.collect()
    assert unhandled == []


@in_loop
async def test_what_is_dropped_as_it_comes_up_is_nobodys() -> None:
    bench = Ahead()
    bench.restorer.begin(bench.order, [])
    task = bench.restorer._engines["a"].task
    assert task is not None
    task.add_done_callback(lambda _: bench.restorer.drop("a"))
    assert await bench.restorer.take(IMAGE, bench.images.spec(CONFIG, (0,))) is None
    assert bench.names().count("units.kill") == 1
