"""The next model comes up while the image of the one before it is being written."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_harness import Life, begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.records import share_now
from llmux.errors import Blame, CheckpointFailed, DriverError, TreeState
from llmux.image_ports import Interrupted
from llmux.protocol import Ask
from tests.twins.disk import MemoryStore
from tests.twins.world import GIB, Hold, World

CHECKPOINT = Eviction(Weights.RETAIN, Process.CHECKPOINT)
CONFIG = config_of(model("a", eviction=CHECKPOINT), model("b", eviction=CHECKPOINT))


async def writing(world: World, runtime: Path, store: MemoryStore) -> tuple[Life, Hold]:
    """a's image is being written, for b."""
    life = await begin_life(CONFIG, world, str(runtime), store)
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    hold = world.hold("checkpointer.dump", model="a")
    life.demand("b", waiting=1)
    await hold.reached.wait()
    return life, hold


@in_loop
async def test_it_serves_before_the_image_is_there(tmp_path: Path) -> None:
    world = World()
    life, hold = await writing(world, tmp_path, MemoryStore())
    await life.until_state("b", "serving")
    assert life.state_of("a") == "parking"
    models = (await life.verbs().answer(Ask(1, "status", {})))["models"]
    assert models["a"]["writing_image"]
    hold.release()
    await life.until_state("a", "parked")
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    assert world.names("units.start") == ["units.start a", "units.start b"]  # a was restored
    assert world.violations == []
    await life.drop()


@pytest.mark.parametrize(
    ("tree", "state"),
    [(TreeState.RUNNING, "parked"), (TreeState.BROKEN, "stopped"), (TreeState.GONE, "stopped")],
)
@in_loop
async def test_a_dump_that_fails_then_touches_no_gpu(
    tmp_path: Path, tree: TreeState, state: str
) -> None:
    world = World()
    life, hold = await writing(world, tmp_path, MemoryStore())
    await life.until_state("b", "serving")
    text = "no space left on device"
    hold.fail(CheckpointFailed("checkpoint", "a", text, tree=tree, blame=Blame.HOST))
    await life.until_state("a", state)
    assert life.state_of("b") == "serving"
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    assert world.hung_hosts == []
    assert world.violations == []
    await life.drop()


@in_loop
async def test_the_engine_may_die_then(tmp_path: Path) -> None:
    world = World()
    life, hold = await writing(world, tmp_path, MemoryStore())
    await life.until_state("b", "serving")
    world.exit("a", "killed by SIGKILL")
    hold.fail(CheckpointFailed("checkpoint", "a", "it is gone", tree=TreeState.GONE))
    await life.until_state("a", "stopped")
    assert life.state_of("b") == "serving"
    assert world.violations == []
    await life.drop()


@in_loop
async def test_one_that_cannot_be_killed_then_claims_nothing(tmp_path: Path) -> None:
    world = World()
    life, hold = await writing(world, tmp_path, MemoryStore())
    await life.until_state("b", "serving")
    world.fail("units.kill", DriverError("kill", "a", "a task hangs"), model="a")
    hold.fail(CheckpointFailed("checkpoint", "a", "CRIU was killed", tree=TreeState.BROKEN))
    await life.until_state("a", "failed")
    assert share_now(life.loop.state.models["a"]) == 0
    assert life.state_of("b") == "serving"
    await life.drop()


@in_loop
async def test_an_order_to_unload_waits_for_the_image(tmp_path: Path) -> None:
    world = World()
    life, hold = await writing(world, tmp_path, MemoryStore())
    await life.until_state("b", "serving")
    hold.release()
    answer = await life.verbs().answer(Ask(1, "unload", {"model": "a"}))
    assert answer == {"message": "Model a is stopped"}
    assert list(world.engines) == ["b"]
    assert world.violations == []
    await life.drop()


@in_loop
async def test_the_next_supervisor_ends_what_was_being_written(tmp_path: Path) -> None:
    world, store = World(), MemoryStore()
    life, _ = await writing(world, tmp_path, store)
    await life.until_state("b", "serving")
    unit = world.engines["a"].handle.unit
    await life.drop()
    interrupted = [Interrupted("a", unit, "dump")]
    life = await begin_life(CONFIG, world, str(tmp_path), store, interrupted=interrupted)
    await life.until_state("b", "serving")
    assert list(world.engines) == ["b"]
    assert life.state_of("a") == "stopped"
    assert world.violations == []
    await life.drop()


@in_loop
async def test_the_next_supervisor_goes_on_from_the_suspend(tmp_path: Path) -> None:
    """The former one ended between the suspend and the dump's first note on disk."""
    world, store = World(), MemoryStore()
    life, _ = await writing(world, tmp_path, store)
    await life.until_state("b", "serving")
    await life.drop()
    life = await begin_life(CONFIG, world, str(tmp_path), store)
    await life.until_state("a", "parked")
    assert life.state_of("b") == "serving"
    assert world.names("cuda.suspend").count("cuda.suspend a") == 2, "it looks whether it is done"
    assert world.violations == []
    await life.drop()


@in_loop
async def test_without_host_memory_for_both_the_next_waits_for_the_image(tmp_path: Path) -> None:
    world = World()
    world.memory_bytes = 3 * GIB
    life, hold = await writing(world, tmp_path, MemoryStore())
    assert life.state_of("b") == "stopped"
    hold.release()
    await life.until_state("b", "serving")
    assert life.state_of("a") == "parked"
    assert world.violations == []
    await life.drop()


@in_loop
async def test_while_the_gpus_cannot_be_seen_the_next_waits(tmp_path: Path) -> None:
    world = World()
    life = await begin_life(CONFIG, world, str(tmp_path), MemoryStore())
    life.demand("a", waiting=1)
    await life.until_state("a", "serving")
    hold = world.hold("checkpointer.dump", model="a")
    world.fail("gpu.look", DriverError("observe", "the GPUs", "no answer within 5 s"), nth=2)
    life.demand("b", waiting=1)
    await hold.reached.wait()
    assert life.state_of("b") == "stopped"
    hold.release()
    await life.until_state("b", "serving")
    assert world.violations == []
    await life.drop()
