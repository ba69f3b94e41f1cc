"""Looking never stands before acting: a GPU driver that hangs keeps no engine from being ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_harness import OFFLOAD, Shop, begin_life, config_of, in_loop, in_virtual_time, model

from llmux.core.plans import Outcome, park_plan, start_plan, stop_plan
from llmux.errors import DriverTimeout, Refused
from llmux.protocol import Ask
from llmux.runtime.reconcile import first_state
from tests.twins.disk import MemoryStore
from tests.twins.world import World

MODEL = model("a")
HANGS = DriverTimeout("observe", "the GPUs", "no answer within 5 s")


@in_virtual_time
async def test_a_kill_sends_its_signals_whatever_the_driver_does(tmp_path: Path) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    hold = world.hold("gpu.look")  # this call never returns
    world.fail("gpu.look", HANGS, always=True)
    ended = await shop.run(MODEL, stop_plan(MODEL))
    assert hold.reached.is_set()
    assert world.engines == {}, "the engine is gone"
    # its memory was not seen to go: the GPU is held, not given out
    assert ended.outcome is Outcome.STUCK
    assert "no answer within 5 s" in ended.detail


@in_loop
async def test_a_release_is_verified_once_the_driver_answers_again(tmp_path: Path) -> None:
    world = World()
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    world.fail("gpu.look", HANGS)
    ended = await shop.run(MODEL, park_plan(MODEL, OFFLOAD))
    assert ended.outcome is Outcome.PARKED, ended


@in_loop
async def test_unload_does_not_say_stopped_of_what_was_not_seen_gone(tmp_path: Path) -> None:
    world = World()
    life = await begin_life(config_of(MODEL), world, str(tmp_path), MemoryStore())
    verbs = life.verbs()
    await verbs.answer(Ask(1, "load", {"model": "a"}))
    world.fail("gpu.look", HANGS, always=True)
    with pytest.raises(Refused, match=r"cannot stop a: .*no answer within 5 s"):
        await verbs.answer(Ask(2, "unload", {"model": "a"}))
    assert world.engines == {}
    await life.drop()


@in_loop
async def test_a_supervisor_starts_with_a_driver_that_hangs(tmp_path: Path) -> None:
    world = World(gpu_bytes=(1, 1, 1))
    world.fail("gpu.look", HANGS, always=True)
    config = config_of(model("a", gpus=(1,)), model("b", gpus=2))
    state = await first_state(config, Shop(world, str(tmp_path)).drivers)
    assert state.gpu_count == 2  # what the models name
