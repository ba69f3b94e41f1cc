"""What hangs and is left behind, what is known of images and weights, and what stays of tasks."""

from __future__ import annotations

import asyncio
import gc
import os
import pwd
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivers_called import ADDRESS, CANARY, CHECKPOINT, CONFIG, HANDLE, Bench
from runtime_harness import OFFLOAD, STOP, Shop, in_loop, in_virtual_time, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import Probe, ReadAhead, RestoreAhead
from llmux.core.events import ImageKnown, ProbeFinished
from llmux.core.plans import Outcome, park_plan, start_plan, stop_plan, wake_plan
from llmux.errors import CheckpointFailed, DriverTimeout, LlmuxError
from llmux.image_ports import Image
from llmux.protocol import Address
from llmux.runtime.engines.facts import EngineFacts, Recipe
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.launch import engine_environment
from llmux.runtime.engines.other_plans import SPARE_BYTES, fitting, offload_bytes, weights_bytes
from llmux.runtime.engines.restore_ahead import END_SECS, AheadRestorer
from llmux.runtime.engines.vitals import Progress
from llmux.runtime.host import Places
from tests.twins.engine import MemoryEngine
from tests.twins.world import World

FACTS = EngineFacts(address=ADDRESS, cuda_pids=(7,), identity={"model": "old"}, canary=CANARY)
IMAGE = Image(
    model="a", path="/i/a", identity={"model": "m"}, created=1.0, dump_seconds=2.0, root_pid=77,
    recipe=Recipe(CHECKPOINT, FACTS).to_json(), apparent_bytes=6, disk_bytes=5,
)  # fmt: skip
MODEL = model("a")
START = start_plan(MODEL, 60.0)
ERRORS = [LlmuxError("it is odd"), OSError(5, "Input/output error")]


def images_on(bench: Bench) -> ImageLifecycle:
    return ImageLifecycle(bench.drivers, bench.told.append, lambda _: None)


# ---- what cannot even be cancelled ---------------------------------------------------------------


class Deaf(MemoryEngine):
    """Whose sleep does not end when it is cancelled, until the test lets it."""

    let_go: asyncio.Event

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self._world.record("cancelled", "a")


@in_virtual_time
async def test_an_operation_that_cannot_be_cancelled_is_left_behind(tmp_path: Path) -> None:
    world = World()
    deaf = Deaf(world)
    deaf.let_go = asyncio.Event()
    shop = Shop(world, str(tmp_path), engine=deaf)
    await shop.run(MODEL, START)
    shop.begin(MODEL, park_plan(MODEL, OFFLOAD))
    await asyncio.sleep(1.0)
    ended = await shop.run(MODEL, stop_plan(MODEL, grace=False))
    assert (ended.outcome, world.engines) == (Outcome.DOWN, {})
    deaf.let_go.set()


@in_virtual_time
async def test_an_end_that_hangs_holds_up_neither_a_wake_nor_the_close_for_ever() -> None:
    bench, stuck = Bench(checkpointer_find=IMAGE, checkpointer_restore=HANDLE), asyncio.Event()

    async def kill(*_: Any) -> None:
        await stuck.wait()

    bench.drivers.units.kill = kill  # type: ignore[assignment,method-assign]
    restorer = AheadRestorer(bench.drivers, images_on(bench))
    restorer.begin(RestoreAhead("a", CONFIG, (0,), (), 500.0), [])
    await asyncio.sleep(1.0)
    with pytest.raises(DriverTimeout, match=f"not done after {END_SECS:g} s"):
        await restorer.dropped("a")
    await restorer.close()
    stuck.set()
    await restorer.dropped("a")
    assert restorer._ending == {}


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=str)
@in_loop
async def test_an_image_that_cannot_be_looked_for_hides_no_other(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    finds: Iterator[Any] = iter([error, IMAGE])
    bench = Bench()

    async def find(*_: Any) -> Any:
        found = next(finds)
        if isinstance(found, Exception):
            raise found
        return found

    bench.drivers.checkpointer.find = find  # type: ignore[method-assign,union-attr]
    known = await images_on(bench).known({"b": replace(CONFIG, name="b"), "a": CONFIG})
    assert known == [ImageKnown("a", CHECKPOINT, 5)]
    assert caplog.messages == [f"cannot look for an image of b: {error}"]


@pytest.mark.parametrize("call", ["checkpointer.find", "checkpointer.read_ahead"])
@in_loop
async def test_an_image_that_cannot_be_read_ahead_is_left_to_the_restore(call: str) -> None:
    unhandled = list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, told: unhandled.append(told))
    for error in ERRORS:
        bench = Bench(checkpointer_find=IMAGE)
        bench.answers[call] = error
        images_on(bench).read_ahead(ReadAhead("a", CONFIG, (0,)))
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        await asyncio.sleep(0)
        assert call in [one[0] for one in bench.seen]
        error.__traceback__ = None  # it would hold what raised it
    gc.collect()
    assert unhandled == []


async def nothing_ahead(*_: Any) -> None:
    return None


@in_loop
async def test_a_restored_engine_is_valid_for_what_its_image_was_found_by() -> None:
    bench = Bench(checkpointer_find=IMAGE, checkpointer_restore=HANDLE)
    bench.instance.used_before, bench.instance.progress = {1: 2}, Progress(1.0, 2.0)
    await images_on(bench).restore(bench.instance, (3,), 900.0, nothing_ahead)
    assert bench.instance.facts == replace(FACTS, identity={"model": "m"}, gpus=(3,))
    left: tuple[Any, ...] = (bench.instance.used_before, bench.instance.progress)
    assert left == ({}, None)


@in_loop
async def test_a_restore_that_failed_leaves_no_engine_of_before() -> None:
    failed = CheckpointFailed("restore", "a", "its pid is taken")
    bench = Bench(checkpointer_find=IMAGE, checkpointer_restore=failed)
    with pytest.raises(CheckpointFailed):
        await images_on(bench).restore(bench.instance, (), 900.0, nothing_ahead)
    assert bench.instance.notes() == {}


# ---- weights that do not fit ---------------------------------------------------------------------

SIZES = {
    "file.a.safetensors": "30 bytes, 1", "file.b.safetensors": "12 bytes, 2",
    "file.config.json": "7 bytes, 3", "file.c.safetensors": "unknown", "model": "9 bytes",
    "file.d.safetensors.index.json": "5 bytes, 4",
}  # fmt: skip
NEED = 42 + SPARE_BYTES


def test_the_bytes_of_weights_are_those_of_its_files_of_weights() -> None:
    assert (weights_bytes(SIZES), offload_bytes(SIZES)) == (42, NEED)
    assert (weights_bytes({}), offload_bytes({"file.config.json": "7 bytes, 3"})) == (0, 0)


@pytest.mark.parametrize(
    ("eviction", "available", "discarded"),
    [
        (OFFLOAD, NEED - 1, True),
        (OFFLOAD, NEED, False),
        (Eviction(Weights.OFFLOAD, Process.FREEZE), NEED - 1, True),
        (Eviction(Weights.DISCARD, Process.KEEP_RUNNING), 0, False),
        (Eviction(Weights.RETAIN, Process.FREEZE), 0, False),
        (STOP, 0, False),
    ],
    ids=str,
)
def test_weights_are_discarded_where_they_do_not_fit(
    eviction: Eviction, available: int, discarded: bool
) -> None:
    plan = park_plan(CONFIG, eviction)
    fits, why = fitting(plan, CONFIG, SIZES, available)
    other = Eviction(Weights.DISCARD, eviction.process)
    assert fits == (park_plan(CONFIG, other) if discarded else plan)
    assert bool(why) is discarded
    for kept in (start_plan(CONFIG, 60.0), wake_plan(CONFIG, eviction)):
        assert fitting(kept, CONFIG, SIZES, 0) == (kept, "")
    assert fitting(plan, CONFIG, {}, 0) == (plan, "")


# ---- the rest ------------------------------------------------------------------------------------


def test_without_a_home_an_engine_has_that_of_who_runs_it() -> None:
    own = pwd.getpwuid(os.geteuid())
    env = engine_environment(CONFIG, (0,), Places("/run", environment={"PATH": "/usr/bin"}))
    assert [env[name] for name in ("HOME", "USER", "LOGNAME")] == [own.pw_dir, *[own.pw_name] * 2]


@pytest.mark.parametrize("parked", [True, False])
@in_loop
async def test_host_memory_is_told_of_what_is_parked_only(tmp_path: Path, parked: bool) -> None:
    shop = Shop(World(), str(tmp_path))
    assert (await shop.run(MODEL, START)).host_bytes is None
    plan = park_plan(MODEL, OFFLOAD if parked else STOP)
    assert ((await shop.run(MODEL, plan)).host_bytes is not None) is parked
    await asyncio.sleep(0)
    assert shop.executor._tasks == set(), "an operation that is over is forgotten"


@pytest.mark.parametrize(
    ("error", "traceback"), [(LlmuxError("no"), False), (RuntimeError("no"), True)]
)
@in_virtual_time
async def test_only_what_was_not_expected_of_a_probe_is_logged_with_its_traceback(
    tmp_path: Path, error: Exception, traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("units.cpu_seconds", error)
    shop.executor.probe(Probe("a", "t.1", MODEL, 60.0, stalled=True))
    assert await shop.posted.get() == ProbeFinished("a", "t.1", "no", stalled=True)
    assert any(record.exc_info for record in caplog.records) is traceback
