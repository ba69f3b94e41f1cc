"""What is written down for the next supervisor, and what it makes of a damaged document."""

from __future__ import annotations

import json
import tempfile

import pytest
from runtime_harness import OFFLOAD, begin_life, config_of, in_loop, model

from llmux.core.adopt import Note
from llmux.core.events import LoadAsked, ParkAsked
from llmux.core.states import ModelState
from llmux.drivers.memory import World
from llmux.drivers.memory_disk import MemoryStore
from llmux.ports import Canary
from llmux.runtime.notes import VERSION, models_in, note_from
from llmux.runtime.words import address_from, canary_from, parse_eviction


@in_loop
async def test_notes_survive_json_and_say_the_same() -> None:
    world, store = World(), MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a"), model("b")), world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        document = json.loads(json.dumps(store.document))
        notes = models_in(document)
        a = life.loop.state.models["a"]
        assert note_from(notes["a"]) == Note(ModelState.SERVING, a.epoch, None, (0,))
        assert note_from(notes["b"]) == Note(ModelState.STOPPED)
        instance = life.loop.executor.instances["a"]
        assert address_from(notes["a"]) == instance.address
        assert canary_from(notes["a"]) == instance.canary == Canary("a says Paris", (-0.5, -0.25))
        life.loop.post(ParkAsked("a"))
        await life.until_state("a", "parked")
        parked = note_from(models_in(json.loads(json.dumps(store.document)))["a"])
        assert (parked.state, parked.eviction) == (ModelState.PARKED, OFFLOAD)
        await life.drop()


@pytest.mark.parametrize(
    "document", [{}, {"version": 999, "models": {"a": {}}}, {"version": VERSION, "models": []}]
)
def test_a_document_of_another_shape_says_nothing(document: dict[str, object]) -> None:
    assert models_in(document) == {}


def test_words_that_are_not_ours_count_as_not_written() -> None:
    note = note_from({"state": "dreaming", "eviction": "x+y", "epoch": 7, "gpus": [0, "1"]})
    assert note == Note(gpus=(0,))
    assert address_from({"uds": None}) is None
    assert canary_from({"canary": ["text"]}) is None


def test_evictions_are_read_as_they_are_printed() -> None:
    assert parse_eviction(str(OFFLOAD)) == OFFLOAD
    for wrong in ("offload", "offload+", "+stop", "a+b"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_eviction(wrong)
