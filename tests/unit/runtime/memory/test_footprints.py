"""GPU and host memory as they are seen, not as a constant says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import (
    DISCARD,
    OFFLOAD,
    STOP,
    Shop,
    begin_life,
    config_of,
    in_loop,
    in_virtual_time,
    model,
)

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import RunPlan
from llmux.core.events import ParkAsked
from llmux.core.plans import Outcome, park_plan, start_plan, wake_plan
from llmux.core.records import share_now
from llmux.core.reducer import initial
from llmux.errors import StateFileError
from llmux.runtime.engines.gpu_memory import residue_share
from llmux.runtime.engines.launch import launch_digest
from llmux.runtime.host import Places
from llmux.runtime.learned import Learned
from tests.twins.disk import MemoryStore
from tests.twins.gpu import MemoryGpu
from tests.twins.world import GIB, Size, World

MODEL = model("a")


def with_residue(gib: int) -> World:
    """A sleep leaves so much of model a on its GPU of 80 GiB."""
    world = World()
    world.sizes["a"] = Size(context=gib * GIB)
    return world


@in_virtual_time
async def test_an_engine_that_gave_back_half_has_left(tmp_path: Path) -> None:
    """Before, what a sleep left beyond 3 % and 1 GiB ended the engine each time it slept."""
    world = with_residue(7)
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    ended = await shop.run(MODEL, park_plan(MODEL, OFFLOAD))
    assert ended.outcome is Outcome.PARKED, ended
    assert world.used(0) == 7 * GIB


@in_virtual_time
async def test_one_that_keeps_its_weights_has_not(tmp_path: Path) -> None:
    world = with_residue(60)
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    ended = await shop.run(MODEL, park_plan(MODEL, OFFLOAD))
    assert ended.outcome is Outcome.DOWN
    assert "still held" in ended.detail


@in_virtual_time
async def test_what_a_sleep_leaves_is_claimed_from_then_on(tmp_path: Path) -> None:
    """b's 0.9 and a's 7 GiB do not fit: before, b's start ended for want of memory."""
    world, store = with_residue(16), MemoryStore()
    config = config_of(model("a"), model("b", gpu_memory=0.9))
    life = await begin_life(config, world, str(tmp_path), store)
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    life.demand("b", waiting=1)
    await life.until_state("b", "serving")
    assert life.state_of("a") == "stopped", "nothing but that makes the room"
    assert world.violations == []
    await life.drop()


@in_virtual_time
async def test_the_next_supervisor_knows_what_was_learned(tmp_path: Path) -> None:
    world, store = with_residue(8), MemoryStore()
    config = config_of(model("a"), model("b", gpu_memory=0.5))
    life = await begin_life(config, world, str(tmp_path), store)
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    life.demand("b", waiting=1)
    await life.until_state("b", "serving")
    assert share_now(life.loop.state.models["a"]) == pytest.approx(0.1)
    await life.drop()
    life = await begin_life(config, world, str(tmp_path), store)
    assert share_now(life.loop.state.models["a"]) == pytest.approx(0.1)
    await life.drop()


@pytest.mark.parametrize("process", [Process.KEEP_RUNNING, Process.CHECKPOINT], ids=str)
@in_loop
async def test_weights_that_do_not_fit_into_host_memory_are_discarded(
    tmp_path: Path, process: Process
) -> None:
    world = World()
    world.sizes["a"] = Size(weights=40 * GIB)
    world.memory_bytes = 32 * GIB
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    wanted = Eviction(Weights.OFFLOAD, process)
    ended = await shop.run(MODEL, park_plan(MODEL, wanted))
    kept = Eviction(Weights.DISCARD, process)
    assert (ended.outcome, ended.eviction) == (Outcome.PARKED, kept)
    assert "41.0 GiB of host memory, and MemAvailable is 32.0 GiB" in ended.detail
    assert (await shop.run(MODEL, wake_plan(MODEL, kept))).outcome is Outcome.UP
    assert world.names("engine.reload_weights") == ["engine.reload_weights a"]
    assert world.violations == []


@pytest.mark.parametrize("eviction", [OFFLOAD, DISCARD], ids=str)
@in_loop
async def test_weights_that_fit_are_parked_as_ordered(tmp_path: Path, eviction: Eviction) -> None:
    world = World()
    world.sizes["a"] = Size(weights=8 * GIB)
    world.memory_bytes = 9 * GIB
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    ended = await shop.run(MODEL, park_plan(MODEL, eviction))
    assert (ended.outcome, ended.eviction, ended.detail) == (Outcome.PARKED, None, "")


@in_virtual_time
async def test_a_release_is_verified_by_the_next_supervisor(tmp_path: Path) -> None:
    """It finds an engine that says that it sleeps, in the middle of its parking."""
    world, store = with_residue(60), MemoryStore()
    config = config_of(model("a"))
    life = await begin_life(config, world, str(tmp_path), store)
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    hold = world.hold("gpu.look", nth=2)  # after the sleep
    life.loop.post(ParkAsked("a"))
    await hold.reached.wait()
    await life.drop()
    life = await begin_life(config, world, str(tmp_path), store)
    await life.loop.wait_for(lambda state: state.models["a"].state.value == "stopped", 30.0)
    assert world.used(0) == 0
    await life.drop()


@in_virtual_time
async def test_what_was_learned_outlives_a_reboot(tmp_path: Path) -> None:
    """No note of a former supervisor is left then, and no engine."""
    world, kept = with_residue(8), MemoryStore()
    config = config_of(model("a"), model("b", gpu_memory=0.5))
    life = await begin_life(config, world, str(tmp_path), MemoryStore())
    life.loop.listeners.append(Learned(kept, life.drivers.places))
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    life.demand("b", waiting=1)
    await life.until_state("b", "serving")
    await life.drop()
    places = life.drivers.places
    state = initial(config, gpu_count=1, epoch_prefix="t")
    record = Learned(kept, places).recall(state).models["a"]
    assert (record.residue, record.awake) == (0.1, 0.9)

    other = config_of(model("a", extra_args=("--max-model-len", "9")), model("b", gpu_memory=0.5))
    state = initial(other, gpu_count=1, epoch_prefix="t")
    found = Learned(kept, places).recall(state).models
    assert (found["a"].residue, found["a"].awake) == (None, None), "it is another engine"
    assert found["b"].awake == 0.5
    for damaged in ({"a": 5}, {"a": {"started_as": "x", "awake": "much"}}):
        assert Learned(MemoryStore(damaged), places).recall(state) == state
    kept.broken = "cut short"
    assert Learned(kept, places).recall(state) == state


@in_virtual_time
async def test_an_engine_that_holds_more_than_it_claims_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA graphs come beside what vLLM is told to use."""
    world = World()
    shop = Shop(world, str(tmp_path))
    world.sizes["a"] = Size(context=50 * GIB, weights=8 * GIB)
    small = model("a", gpu_memory=0.5)
    with caplog.at_level("WARNING"):
        await shop.run(small, start_plan(small, 60.0))
    warned = "a holds 72.5 % of its GPUs, and claims 50.0 %"
    assert any(warned in text for text in caplog.messages)

    caplog.clear()
    config, places = config_of(small, model("b"), model("c")), shop.drivers.places
    digests = {name: launch_digest(one, (), places) for name, one in config.models.items()}
    seen = {"a": 0.725, "b": 0.5, "c": None}
    kept = {name: {"started_as": digests[name], "awake": share} for name, share in seen.items()}
    with caplog.at_level("WARNING"):
        Learned(MemoryStore(kept), places).recall(initial(config, gpu_count=1, epoch_prefix="t"))
    (again,) = caplog.messages
    assert warned in again, "by the next supervisor, too, and nothing of the others"


@pytest.mark.parametrize(
    ("version", "eviction", "warned"),
    [("0.15.1", OFFLOAD, True), ("0.15.1", STOP, False), ("0.17.0", OFFLOAD, False)],
)
@in_virtual_time
async def test_an_engine_whose_version_cannot_be_parked_so_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str, eviction: Eviction, warned: bool
) -> None:
    world = World()
    world.version = version
    one = model("a", eviction=eviction)
    with caplog.at_level("WARNING"):
        ended = await Shop(world, str(tmp_path)).run(one, start_plan(one, 60.0))
    assert ended.outcome is Outcome.UP, "what a sleep does is seen anyway"
    assert any(f"vLLM {version} of a: sleep does not" in t for t in caplog.messages) is warned


@in_virtual_time
async def test_an_engine_that_failed_is_gone_when_its_own_memory_is(tmp_path: Path) -> None:
    """Not when that of the engine before it is, whose processes ended long ago."""
    world = World()
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    await shop.run(MODEL, park_plan(MODEL, OFFLOAD))
    world.exit("a")
    world.fail("engine.wait_healthy")
    kill = world.hold("units.kill")
    shop.begin(MODEL, start_plan(MODEL, 60.0))
    await kill.reached.wait()
    world.foreign[world.engines["a"].handle.pid] = (0, 10 * GIB)  # the driver is late
    kill.release()
    ended = await shop.ended()
    assert ended.outcome is Outcome.STUCK
    assert "10.0 GiB still held" in ended.detail


@pytest.mark.parametrize(
    ("eviction", "held", "configured", "share"),
    [
        (OFFLOAD, 8 * GIB, None, 0.1),
        (OFFLOAD, 8 * GIB + 1, None, 0.101),
        (DISCARD, 8 * GIB, None, 0.1),
        (OFFLOAD, 0, None, None),
        (OFFLOAD, 8 * GIB, 0.2, None),
        (STOP, 8 * GIB, None, None),
        (Eviction(Weights.RETAIN, Process.CUDA_SUSPEND), 8 * GIB, None, None),
        (Eviction(Weights.RETAIN, Process.KEEP_RUNNING), 8 * GIB, None, None),
        (Eviction(Weights.RETAIN, Process.FREEZE), 8 * GIB, None, None),
    ],
    ids=str,
)
@in_loop
async def test_what_a_sleep_leaves_is_learned_where_the_way_of_parking_leaves_something(
    eviction: Eviction, held: int, configured: float | None, share: float | None
) -> None:
    config = model("a", eviction=eviction, gpu_memory_parked=configured)
    effect = RunPlan("a", 1, park_plan(config, eviction), config, (0,))
    assert await residue_share(MemoryGpu(World()), effect, held) == share
    nowhere = RunPlan("a", 1, park_plan(config, eviction), config, (5,))
    assert await residue_share(MemoryGpu(World()), nowhere, held) is None


@pytest.mark.parametrize("error", [StateFileError("the disk is full"), RuntimeError("a fault")])
def test_what_cannot_be_kept_is_said_and_a_fault_of_ours_is_not_hidden(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(MemoryStore):
        def save(self, document: Mapping[str, Any]) -> None:
            raise error

    state = initial(config_of(model("a")), gpu_count=1, epoch_prefix="n")
    models = MappingProxyType({"a": replace(state.models["a"], residue=0.5)})
    learned = Learned(Full(), Places())
    if isinstance(error, StateFileError):
        learned.published(state, replace(state, models=models))
        assert caplog.messages == ["the disk is full"]
    else:
        with pytest.raises(RuntimeError):
            learned.published(state, replace(state, models=models))
