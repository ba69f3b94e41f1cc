"""A port that another process holds: nothing is spawned onto it, nothing there is granted."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_harness import Shop, begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.plans import Outcome, park_plan, start_plan, wake_plan
from llmux.protocol import Grant
from tests.twins.disk import MemoryStore
from tests.twins.world import World

PORT = 4242
MODEL = model("a", port=PORT)
HELD = 'cannot use port 4242 for model "a": process 7 (nc) listens there'


@pytest.fixture
def world() -> World:
    return World()


@in_loop
async def test_nothing_is_spawned_onto_a_port_that_another_process_holds(
    world: World, tmp_path: Path
) -> None:
    world.strangers[PORT] = "process 7 (nc)"
    shop = Shop(world, str(tmp_path))
    ended = await shop.run(MODEL, start_plan(MODEL, 60.0))
    assert ended.outcome is Outcome.DOWN
    assert HELD in ended.detail
    assert "units.start" not in [call.operation for call in world.calls]


@in_loop
async def test_one_that_answers_in_the_engines_place_is_not_asked_to_infer(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    answer = world.hold("engine.wait_healthy")
    shop.begin(MODEL, start_plan(MODEL, 60.0))
    await answer.reached.wait()
    world.strangers[PORT] = "process 7 (nc)"
    answer.release()
    ended = await shop.ended()
    assert ended.outcome is Outcome.DOWN
    assert HELD in ended.detail
    assert "engine.canary" not in [call.operation for call in world.calls]
    assert not world.engines


@in_loop
async def test_one_that_comes_while_the_engine_infers_is_granted_nothing(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    answer = world.hold("engine.canary")
    shop.begin(MODEL, start_plan(MODEL, 60.0))
    await answer.reached.wait()
    world.strangers[PORT] = "process 7 (nc)"
    answer.release()
    ended = await shop.ended()
    assert ended.outcome is Outcome.DOWN
    assert HELD in ended.detail


@pytest.mark.parametrize("port", [PORT, None])
@in_loop
async def test_a_wake_is_not_granted_while_another_process_listens(
    world: World, tmp_path: Path, port: int | None
) -> None:
    sleeper = model("a", port=port, eviction=Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING))
    shop = Shop(world, str(tmp_path))
    assert (await shop.run(sleeper, start_plan(sleeper, 60.0))).outcome is Outcome.UP
    await shop.run(sleeper, park_plan(sleeper, sleeper.eviction))
    where: int | str = port or f"{tmp_path}/engines/a/api.sock"
    world.strangers[where] = "process 7 (nc)"
    ended = await shop.run(sleeper, wake_plan(sleeper, sleeper.eviction))
    assert ended.outcome is Outcome.DOWN
    assert 'for model "a": process 7 (nc) listens there' in ended.detail
    assert not world.engines


@in_loop
async def test_a_supervisor_that_finds_one_in_an_engines_place_grants_nothing(
    world: World, tmp_path: Path
) -> None:
    store, config = MemoryStore(), config_of(MODEL)
    life = await begin_life(config, world, str(tmp_path), store)
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    await life.drop()
    world.strangers[PORT] = "process 7 (nc)"
    life = await begin_life(config, world, str(tmp_path), store)
    await life.settled()
    assert not life.said(Grant)
    assert not world.engines
    await life.drop()
