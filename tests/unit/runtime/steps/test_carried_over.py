"""What one moment of an engine's life must leave for the next: its GPUs, its names, its figures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from drivers_called import ADDRESS, CHECKPOINT, CONFIG, HANDLE, Bench
from runtime_harness import OFFLOAD, Shop, in_loop, in_virtual_time, model

from llmux.core.effects import RestoreAhead, RunPlan
from llmux.core.plans import Outcome, park_plan, start_plan, stop_plan
from llmux.errors import EngineUnhealthy, LlmuxError
from llmux.image_ports import Image
from llmux.ports import Vitals
from llmux.runtime.engines.facts import EngineFacts, Recipe
from llmux.runtime.engines.gpu_memory import verify_release
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.restore_ahead import AheadRestorer
from llmux.runtime.engines.vitals import COMPUTES, Watch
from tests.twins.world import World

MODEL = model("a")
START = start_plan(MODEL, 60.0)
IMAGE = Image(
    model="a", path="/i/a", identity={}, created=1.0, dump_seconds=2.0, root_pid=77,
    recipe=Recipe(CHECKPOINT, EngineFacts(address=ADDRESS, cuda_pids=(7,))).to_json(),
    apparent_bytes=6, disk_bytes=5,
)  # fmt: skip


# ---- operations ----------------------------------------------------------------------------------


@in_loop
async def test_an_engine_is_on_the_gpus_of_its_last_operation_that_had_any(tmp_path: Path) -> None:
    shop = Shop(World((1 << 40, 1 << 40)), str(tmp_path))
    seen = list[Any]()
    plans = ((START, (1,)), (stop_plan(MODEL), ()), (START, (0, 1)))
    for op, (plan, gpus) in enumerate(plans, 1):
        shop._op = op
        shop.executor.run(RunPlan("a", op, plan, MODEL, gpus))
        await shop.ended()
        seen.append(shop.executor.instance(MODEL).facts.gpus)
    assert seen == [(1,), (1,), (0, 1)]


@in_loop
async def test_a_cold_start_took_no_longer_than_it_was_waited_for(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    began = monotonic()
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP
    assert 0.0 < shop.executor.instance(MODEL).facts.cold_seconds <= monotonic() - began


@in_loop
async def test_a_start_that_failed_is_no_measure_of_the_next(tmp_path: Path) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    before = shop.executor.instance(MODEL).facts.cold_seconds
    world.fail("engine.wait_healthy")
    assert (await shop.run(MODEL, START)).outcome is Outcome.DOWN
    assert shop.executor.instance(MODEL).facts.cold_seconds == before


@in_loop
async def test_what_held_nothing_before_is_released_without_a_look() -> None:
    bench = Bench(gpu_available=True)
    for name in ("processes", "totals"):
        bench.answers[f"gpu.{name}"] = LlmuxError("NVML hangs")
    effect = RunPlan("a", 1, park_plan(CONFIG, OFFLOAD), CONFIG, (0,))
    assert await verify_release(bench.drivers.gpu, effect, {}, 3.0) == 0
    assert bench.seen == []


# ---- what is ahead -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "removed"),
    [
        ([("x",), ()], ("x",)),  # as a dead engine has none
        ([("x", "b"), ("a", "x")], ("a", "b", "x")),
        ([(), ("y",)], ("y",)),
    ],
)
@in_virtual_time
async def test_the_names_of_an_engine_restored_ahead_are_removed_whenever_they_were_seen(
    looks: list[tuple[str, ...]], removed: tuple[str, ...]
) -> None:
    seen = iter(looks)
    bench = Bench(
        checkpointer_find=IMAGE, checkpointer_restore=HANDLE,
        checkpointer_shm_names=lambda: next(seen),
    )  # fmt: skip
    restorer = AheadRestorer(bench.drivers, ImageLifecycle(bench.drivers, print, print))
    restorer.begin(RestoreAhead("a", CONFIG, (0,), (), 500.0), [])
    await asyncio.sleep(1.0)
    await restorer.dropped("a")
    calls = [call for call in bench.seen if call[0] == "checkpointer.remove_shm"]
    assert calls == [("checkpointer.remove_shm", "a", removed)]


# ---- signs of life -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "lives"), [((900.0, 0.0), False), ((900.0, 30 * COMPUTES), True), ((0.0, 0.0), False)]
)
@in_virtual_time
async def test_what_an_engine_computed_before_the_watch_is_no_sign_of_life(
    used: tuple[float, float], lives: bool
) -> None:
    bench, before = Bench(engine_vitals=Vitals(None)), iter([used[0]])
    bench.answers["units.cpu_seconds"] = lambda: next(before, sum(used))
    watch = Watch(bench.drivers, "a", ADDRESS, HANDLE, stalled=True, progress=None)
    if lives:
        await watch.run(30.0)
    else:
        with pytest.raises(EngineUnhealthy, match="no answer and no computing for 30 s"):
            await watch.run(30.0)


@in_loop
async def test_an_engine_without_a_unit_computes_nothing() -> None:
    bench = Bench(engine_vitals=Vitals(200))
    watch = Watch(bench.drivers, "a", ADDRESS, None, stalled=False, progress=None)
    await watch.run(30.0)
    assert [call[0] for call in bench.seen] == ["engine.vitals"]
