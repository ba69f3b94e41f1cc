"""A validation is in manual mode: neither its end nor a crash in the middle leaves llmux there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from runtime_harness import OFFLOAD, STOP, begin_life, config_of, in_loop, model

from llmux.core.events import ConfigChanged, LoadAsked, ModeSet
from llmux.errors import Reason, Refused
from tests.twins.disk import MemoryStore
from tests.twins.world import GIB, Size, World

CONFIG = config_of(model("a"), model("b"))


@in_loop
async def test_the_mode_that_operators_set_is_what_is_noted(tmp_path: Path) -> None:
    world, store = World(), MemoryStore()
    life = await begin_life(CONFIG, world, str(tmp_path), store)
    noted: list[tuple[bool, object, object]] = []

    def report(_phase: str, _seconds: float, _done: int, _total: int) -> None:
        notes = store.load()
        noted.append((life.loop.state.manual, notes.get("manual"), notes.get("pinned")))

    result = await life.validation("a", report).run([OFFLOAD])
    assert result["passed"]
    (row,) = result["policies"]
    figures = [f"gpu_{when}_bytes" for when in ("before", "parked", "woken")]
    assert all(row[name] is not None for name in ("sleep_secs", "wake_secs", *figures)), row
    assert (row["response"], row["problems"]) == ("match", [])
    assert (True, False, None) in noted
    assert (True, True, "a") not in noted
    await life.settled()
    assert not life.loop.state.manual
    life.loop.post(ModeSet(True, "b"))
    await life.settled()
    assert (store.load()["manual"], store.load()["pinned"]) == (True, "b")
    await life.drop()


@in_loop
async def test_a_supervisor_killed_in_the_middle_is_followed_by_one_in_automatic_mode(
    tmp_path: Path,
) -> None:
    world, store = World(), MemoryStore()
    life = await begin_life(CONFIG, world, str(tmp_path), store)
    documents = []

    def report(phase: str, _seconds: float, _done: int, _total: int) -> None:
        if phase == "sleep":
            documents.append(store.load())

    await life.validation("a", report).run([OFFLOAD])
    await life.drop()
    store.save(documents[0])  # what was on disk when it was killed
    successor = await begin_life(CONFIG, world, str(tmp_path), store)
    assert not successor.loop.state.manual
    await successor.drop()


@in_loop
async def test_a_reload_during_a_validation_is_not_undone(tmp_path: Path) -> None:
    world = World()
    config = config_of(model("a", eviction=STOP), model("b"))
    life = await begin_life(config, world, str(tmp_path), MemoryStore())
    changed = replace(config.models["a"], eviction=STOP, wake_timeout_secs=77.0)
    models = {**config.models, "a": changed}

    def report(phase: str, _seconds: float, _done: int, _total: int) -> None:
        if phase == "sleep":
            life.loop.post(ConfigChanged(replace(config, models=MappingProxyType(models))))

    result = await life.validation("a", report).run([OFFLOAD])
    assert result["passed"], result
    await life.settled()
    assert life.loop.state.config.models["a"] == changed
    assert life.loop.state.models["a"].config == changed
    started = [call.args[0] for call in world.calls if call.operation == "units.start"]
    assert ["--enable-sleep-mode" in spec.argv for spec in started] == [True]
    life.loop.post(LoadAsked("a"))
    await life.until_state("a", "serving")
    assert "--enable-sleep-mode" not in world.engines["a"].spec.argv  # the trial is over
    await life.drop()


@in_loop
async def test_an_engine_that_answers_without_its_memory_was_not_woken(tmp_path: Path) -> None:
    world, store = World(), MemoryStore()
    life = await begin_life(CONFIG, world, str(tmp_path), store)

    def report(_phase: str, _seconds: float, _done: int, _total: int) -> None:
        if "engine.wake a" in world.names():
            world.engines["a"].held = dict.fromkeys(world.engines["a"].held, 0)

    result = await life.validation("a", report).run([OFFLOAD])
    (row,) = result["policies"]
    assert not result["passed"]
    assert [problem for problem in row["problems"] if "woke without its memory" in problem]
    await life.drop()


@pytest.mark.parametrize("gpus", [1, (0,)], ids=["any", "named"])
@pytest.mark.parametrize("served", [False, True], ids=["never placed", "parked"])
@in_loop
async def test_a_model_beside_which_it_has_no_room_is_named_and_nothing_is_moved(
    tmp_path: Path, gpus: int | tuple[int, ...], served: bool
) -> None:
    config = config_of(model("a", gpus=gpus), model("b"), model("c", gpu_memory=0.05))
    world = World()
    world.sizes["c"] = Size(weights=GIB)
    life = await begin_life(config, world, str(tmp_path), MemoryStore())
    for name in ("a", "b") if served else ("b",):
        life.demand(name, waiting=1)
        await life.until_state(name, "serving")
    before = life.state_of("a")
    with pytest.raises(Refused, match="GPU 0 has no room for it beside b, and") as refused:
        await life.validation("a").run([OFFLOAD])
    assert (refused.value.reason, refused.value.hint) == (Reason.CANNOT_FIT, "llmux unload b")
    assert (life.state_of("a"), life.state_of("b")) == (before, "serving")
    assert (await life.validation("c").run([OFFLOAD]))["passed"], "it fits beside"
    await life.drop()


@pytest.mark.parametrize("gpus", [(1,), (0,)])
@in_loop
async def test_only_models_on_the_same_gpu_are_in_the_way(
    tmp_path: Path, gpus: tuple[int, ...]
) -> None:
    world = World((80 * GIB, 80 * GIB))
    config = config_of(model("a", gpus=(0,)), model("b", gpus=gpus))
    life = await begin_life(replace(config, gpu_count=2), world, str(tmp_path), MemoryStore())
    life.loop.post(LoadAsked("b"))
    await life.until_state("b", "serving")
    if gpus == (1,):
        assert (await life.validation("a").run([OFFLOAD]))["passed"]
    else:
        with pytest.raises(Refused, match="GPU 0 has no room for it beside b"):
            await life.validation("a").run([OFFLOAD])
    await life.drop()


@in_loop
async def test_a_model_that_is_removed_meanwhile_is_not_brought_up_again(tmp_path: Path) -> None:
    life = await begin_life(CONFIG, World(), str(tmp_path), MemoryStore())
    life.loop.post(LoadAsked("a"))
    await life.until_state("a", "serving")
    removed = replace(CONFIG, models=MappingProxyType({"b": CONFIG.models["b"]}))
    asked: list[str] = []

    def report(phase: str, _seconds: float, _done: int, _total: int) -> None:
        if phase == "sleep" and not asked:
            asked.append(phase)
            life.loop.post(ConfigChanged(removed))

    result = await life.validation("a", report).run([OFFLOAD])
    assert asked and not result["passed"]
    await life.settled()
    assert set(life.loop.state.models) == {"b"}
    assert not life.loop.state.manual
    await life.drop()
