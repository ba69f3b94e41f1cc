"""A validation is in manual mode: neither its end nor a crash in the middle leaves llmux there."""

from __future__ import annotations

from pathlib import Path

from runtime_harness import OFFLOAD, begin_life, config_of, in_loop, model

from llmux.core.events import ModeSet
from llmux.drivers.memory import World
from llmux.drivers.memory_disk import MemoryStore
from llmux.runtime.validation import Validation

CONFIG = config_of(model("a"), model("b"))


@in_loop
async def test_the_mode_that_operators_set_is_what_is_noted(tmp_path: Path) -> None:
    world, store = World(), MemoryStore()
    life = await begin_life(CONFIG, world, str(tmp_path), store)
    noted: list[tuple[bool, object, object]] = []

    def tell(_phase: str, _seconds: float, _done: int, _total: int) -> None:
        notes = store.load()
        noted.append((life.loop.state.manual, notes.get("manual"), notes.get("pinned")))

    result = await Validation(life.loop, "a", tell).run([OFFLOAD])
    assert result["passed"]
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

    def tell(phase: str, _seconds: float, _done: int, _total: int) -> None:
        if phase == "sleep":
            documents.append(store.load())

    await Validation(life.loop, "a", tell).run([OFFLOAD])
    await life.drop()
    store.save(documents[0])  # what was on disk when it was killed
    successor = await begin_life(CONFIG, world, str(tmp_path), store)
    assert not successor.loop.state.manual
    await successor.drop()
