"""A supervisor may end at any point. The one after it finds every engine, harms none that
serves, and answers everyone: Hypothesis chooses what happens and where the crash comes."""

from __future__ import annotations

import asyncio
import tempfile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runtime_harness import (
    DISCARD,
    OFFLOAD,
    OFFLOAD_FREEZE,
    STOP,
    Life,
    begin_life,
    config_of,
    in_loop,
    model,
)

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.events import EvictionSet, LoadAsked, ModeSet, ParkAsked
from llmux.core.records import ROUNDING, Parked, State, share_now
from llmux.protocol import Grant
from tests.twins.disk import MemoryStore
from tests.twins.world import Hold, World

# Every act of the supervisor on the world; it may end in, before or after any of them.
ACTS = (
    "units.start",
    "engine.wait_healthy",
    "engine.describe",
    "engine.canary",
    "engine.sleep",
    "freezer.freeze",
    "freezer.thaw",
    "engine.wake",
    "engine.reload_weights",
    "cuda.suspend",
    "checkpointer.dump",
    "checkpointer.restore",
    "checkpointer.confirm_restore",
    "cuda.resume",
    "units.terminate",
    "units.kill",
)
CHECKPOINT = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
OFFLOAD_SUSPEND = Eviction(Weights.OFFLOAD, Process.CUDA_SUSPEND)
EVICTIONS = [Eviction(weights, process) for weights in Weights for process in Process]
MODELS = ("a", "b")
Step = tuple[str, str]

steps = st.lists(
    st.tuples(st.sampled_from(["load", "park", "unload", "ask"]), st.sampled_from(MODELS)),
    min_size=1,
    max_size=5,
)


@pytest.mark.timeout(300)  # a hundred examples, on a busy machine
@settings(max_examples=100, deadline=None)
@given(
    script=steps,
    evictions=st.tuples(st.sampled_from(EVICTIONS), st.sampled_from(EVICTIONS)),
    act=st.sampled_from(ACTS),
    nth=st.integers(1, 3),
    done=st.booleans(),
    notes=st.sampled_from(["kept", "lost"]),
)
@example([("load", "a")], (OFFLOAD, STOP), "engine.wait_healthy", 1, False, "kept")
@example([("load", "a"), ("park", "a")], (OFFLOAD_FREEZE, STOP), "freezer.freeze", 1, True, "kept")
@example([("load", "a"), ("park", "a")], (OFFLOAD_FREEZE, STOP), "freezer.freeze", 1, True, "lost")
@example([("load", "a"), ("ask", "b")], (DISCARD, OFFLOAD), "engine.sleep", 1, True, "kept")
@example([("load", "b"), ("load", "a")], (STOP, CHECKPOINT), "checkpointer.dump", 1, False, "kept")
@example([("load", "a"), ("park", "a")], (OFFLOAD_SUSPEND, STOP), "cuda.suspend", 1, True, "kept")
@example([("load", "a"), ("park", "a")], (SUSPEND, STOP), "freezer.freeze", 1, True, "kept")
@example([("load", "a"), ("park", "a")], (SUSPEND, STOP), "freezer.freeze", 1, True, "lost")
@example(
    [("load", "b"), ("load", "a"), ("load", "b")], (STOP, DISCARD), "engine.wake", 1, True, "lost"
)
def test_a_supervisor_that_ends_anywhere_is_followed_by_one_that_goes_on(
    script: list[Step],
    evictions: tuple[object, object],
    act: str,
    nth: int,
    done: bool,
    notes: str,
) -> None:
    asyncio.run(_crash_and_go_on(script, evictions, act, nth, done, notes))


async def _crash_and_go_on(
    script: list[Step],
    evictions: tuple[object, object],
    act: str,
    nth: int,
    done: bool,
    notes: str,
) -> None:
    config = config_of(
        *(model(name, eviction=how) for name, how in zip(MODELS, evictions, strict=True))
    )
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config, world, runtime, store)
        hold = world.hold(act, nth=nth)
        await _play(life, script, hold)
        served = _serving(life)
        pids = {name: engine.handle.pid for name, engine in world.engines.items()}
        if done:  # the act takes effect, and its answer is lost
            hold.release()
            await asyncio.sleep(0)
        await life.drop()
        hold.release()
        if notes == "lost":
            store = MemoryStore()
        life = await begin_life(config, world, runtime, store, holds=served)
        await life.settled()
        check(life, world)
        for name in served:
            assert world.engines[name].handle.pid == pids[name], f"{name} was disturbed"
            assert life.state_of(name) == "serving"
        for name in MODELS:  # and everyone who comes now is served
            if life.state_of(name) != "serving":
                life.demand(name, waiting=1)
            await life.until(lambda state, name=name: serves(state, name))  # type: ignore[misc]  # bound by a default
        check(life, world)
        await life.drop()
    assert world.violations == []


async def _play(life: Life, script: list[Step], hold: Hold) -> None:
    """Until the supervisor stands still in the act, or the script is over."""
    for verb, name in script:
        match verb:
            case "load":
                life.loop.post(LoadAsked(name))
            case "park":
                life.loop.post(ParkAsked(name))
            case "unload":
                life.loop.post(ParkAsked(name, STOP))
            case _ if life.state_of(name) != "serving":  # else it would be let in at once
                life.demand(name, waiting=1)
        resting: asyncio.Future[Any] = asyncio.ensure_future(life.settled())
        reached: asyncio.Future[Any] = asyncio.ensure_future(hold.reached.wait())
        done, pending = await asyncio.wait({resting, reached}, return_when=asyncio.FIRST_COMPLETED)
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for future in done:
            future.result()
        if hold.reached.is_set():
            return


def _serving(life: Life) -> dict[str, str]:
    """What the worker holds: the epochs that were granted and not revoked."""
    return {
        name: record.epoch
        for name, record in life.loop.state.models.items()
        if record.state.value == "serving" and record.epoch is not None
    }


def serves(state: State, name: str) -> bool:
    return state.models[name].state.value == "serving"


def check(life: Life, world: World) -> None:
    state = life.loop.state
    for gpu in range(state.gpu_count):
        load = sum(share_now(record) for record in state.models.values() if gpu in record.gpus)
        assert load <= 1 + 10 * ROUNDING
    living = {name for name, r in state.models.items() if r.state.value in ("serving", "parked")}
    on_disk = {
        name
        for name, r in state.models.items()
        if isinstance(r.phase, Parked) and r.phase.eviction.process is Process.CHECKPOINT
    }
    assert set(world.engines) == living - on_disk
    assert world.restoring == set()
    for name, engine in world.engines.items():
        if state.models[name].state.value == "serving":
            assert not engine.frozen
            assert not engine.asleep
            assert not engine.spoiled


@pytest.mark.parametrize("eviction", [SUSPEND, OFFLOAD_SUSPEND], ids=str)
@pytest.mark.parametrize("act", ["cuda.suspend", "freezer.freeze"])
@pytest.mark.parametrize("notes", ["kept", "lost"])
@in_loop
async def test_an_engine_whose_cuda_state_went_under_a_former_supervisor_gets_it_back(
    eviction: Eviction, act: str, notes: str
) -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a", eviction=eviction), model("b"))
        life = await begin_life(config, world, runtime, store)
        hold = world.hold(act)
        await _play(life, [("load", "a"), ("park", "a")], hold)
        pid = world.engines["a"].handle.pid
        hold.release()
        await asyncio.sleep(0)
        await life.drop()
        life = await begin_life(config, world, runtime, store if notes == "kept" else MemoryStore())
        await life.settled()
        assert life.state_of("a") == "parked"
        life.demand("a", waiting=1)
        await life.until_state("a", "serving")
        assert world.engines["a"].handle.pid == pid, "woken, not started anew"
        check(life, world)
        await life.drop()
    assert world.violations == []


@in_loop
async def test_an_engine_without_its_cuda_state_is_not_asked_to_end_by_itself() -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a", eviction=SUSPEND)), world, runtime, store)
        for verb in ("load", "park", "unload"):
            await _play(life, [(verb, "a")], world.hold("never"))
        assert (life.state_of("a"), world.engines) == ("stopped", {})
        await life.drop()
    assert world.violations == []


@in_loop
async def test_a_worker_that_kept_its_epoch_is_not_granted_anew() -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a"))
        life = await begin_life(config, world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        held = _serving(life)
        await life.drop()
        life = await begin_life(config, world, runtime, store, holds=held)
        await life.until(lambda state: "w" in state.workers)
        assert life.said(Grant) == []
        assert _serving(life) == held
        await life.drop()


@in_loop
async def test_engines_of_models_that_are_configured_no_longer_are_stopped() -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a"), model("b")), world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        await life.drop()
        life = await begin_life(config_of(model("b")), world, runtime, store)
        await life.until(lambda state: set(state.models) == {"b"})
        assert world.engines == {}
        await life.drop()


@pytest.mark.parametrize("notes", ["kept", "lost"])
@pytest.mark.parametrize("much", [False, True])
@in_loop
async def test_one_that_sleeps_and_holds_much_is_half_awake_where_no_note_says_what_it_did(
    much: bool, notes: str
) -> None:
    """With a note that it served it was put to sleep as a whole, and what it holds is its own."""
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a"))
        life = await begin_life(config, world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        await life.drop()
        engine = world.engines["a"]
        engine.level, engine.asleep = 1, {"weights", "kv_cache"}
        if not much:
            engine.held = {"context": engine.used["context"]}
        life = await begin_life(config, world, runtime, store if notes == "kept" else MemoryStore())
        await life.settled()
        stopped = much and notes == "lost"
        assert life.state_of("a") == ("stopped" if stopped else "parked")
        await life.drop()


@in_loop
async def test_what_operators_ordered_outlives_the_supervisor() -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a"))
        life = await begin_life(config, world, runtime, store)
        life.loop.post(EvictionSet("a", STOP))
        life.loop.post(ModeSet(manual=True, pinned="a"))
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        await life.drop()
        life = await begin_life(config, world, runtime, store)
        assert life.loop.state.manual
        assert life.loop.state.pinned == "a"
        assert life.loop.state.models["a"].eviction == STOP
        await life.drop()


@pytest.mark.parametrize("notes", ["kept", "lost"])
@in_loop
async def test_one_whose_cuda_state_may_have_been_away_leaves_the_gpu_before_it_ends(
    notes: str,
) -> None:
    """Whether it was is in the notes only: without them it is done for every engine."""
    for parks in (True, False):
        world, store = World(), MemoryStore()
        with tempfile.TemporaryDirectory() as runtime:
            config = config_of(model("a", eviction=SUSPEND))
            life = await begin_life(config, world, runtime, store)
            orders = ("load", "park", "load") if parks else ("load",)
            for verb in orders:
                await _play(life, [(verb, "a")], world.hold("never"))
            await life.drop()
            before = world.names("cuda.suspend")
            store = store if notes == "kept" else MemoryStore()
            life = await begin_life(config, world, runtime, store)
            await _play(life, [("unload", "a")], world.hold("never"))
            assert world.engines == {}
            assert world.hung_hosts == []
            asked = len(world.names("cuda.suspend")) - len(before)
            assert asked == (1 if parks or notes == "lost" else 0)
            await life.drop()
        assert world.violations == []
