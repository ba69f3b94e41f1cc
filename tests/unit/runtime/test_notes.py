"""What is written down for the next supervisor, and what it makes of a damaged document."""

from __future__ import annotations

import json
import math
import tempfile
from time import monotonic

import pytest
from runtime_harness import DISCARD, OFFLOAD, begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction
from llmux.core.adopt import Note
from llmux.core.events import ConfigChanged, LoadAsked, ParkAsked, PinSet
from llmux.core.reducer import initial
from llmux.core.states import ModelState
from llmux.ports import Canary
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.notes import VERSION, models_in, note_from, pins_in
from llmux.runtime.reconcile import restore_orders
from llmux.typed_json import BadJson
from tests.twins.disk import MemoryStore
from tests.twins.world import World


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
        since = a.phase.since
        assert note_from(notes["a"]) == Note(ModelState.SERVING, a.epoch, None, (0,), since)
        assert note_from(notes["b"]) == Note(ModelState.STOPPED)
        instance = life.loop.executor.instances["a"]
        assert EngineFacts.from_json(notes["a"]) == instance.facts
        assert instance.facts.canary == Canary("a says Paris", (-0.5, -0.25))
        life.loop.post(ParkAsked("a"))
        await life.until_state("a", "parked")
        parked = note_from(models_in(json.loads(json.dumps(store.document)))["a"])
        assert (parked.state, parked.eviction) == (ModelState.PARKED, OFFLOAD)
        await life.drop()


@in_loop
async def test_a_failure_outlives_the_supervisor_with_its_reason_and_its_back_off() -> None:
    world, store = World(), MemoryStore()
    world.fail("units.start", always=True)
    with tempfile.TemporaryDirectory() as runtime:
        config = config_of(model("a"), backoff_secs=50.0)
        life = await begin_life(config, world, runtime, store)
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "failed")
        before = life.loop.state.models["a"]
        await life.drop()
        after = (await begin_life(config, world, runtime, store)).loop.state.models["a"]
    assert after.phase == before.phase
    assert after.failures == before.failures == 1


@pytest.mark.parametrize(
    "document", [{}, {"version": 999, "models": {"a": {}}}, {"version": VERSION, "models": []}]
)
def test_a_document_of_another_shape_says_nothing(document: dict[str, object]) -> None:
    assert models_in(document) == {}


def test_words_that_are_not_ours_count_as_not_written() -> None:
    note = note_from({"state": "dreaming", "eviction": "x+y", "epoch": 7, "gpus": [0, "1"]})
    assert note == Note(gpus=(0,))
    damaged = {"since": "x", "until": True, "message": 1, "failures": -1}
    assert note_from(damaged) == Note()
    assert EngineFacts.from_json({"uds": None}).address is None
    with pytest.raises(BadJson, match="canary: expected a list of 2"):
        EngineFacts.from_json({"canary": ["text"]})


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("gpus", [0, 1023, 1024, -1, True, 1.0, "2"], (0, 1023)),
        ("gpus", "0", ()),
        ("failures", 3, 3),
        ("failures", True, 0),
        ("failures", 2.0, 0),
        ("since", 7, 7.0),
        ("since", True, None),
        ("since", math.inf, None),
        ("since", math.nan, None),
        ("since", 10**400, None),
        ("until", 10**400, None),
        ("until", -(10**400), None),
        ("failures", 10**400, 0),
        ("failures", [3], 0),
        ("epoch", "e1", "e1"),
        ("epoch", "e" * 1000, None),
        ("gpus", [[0], {"a": 1}, 10**400, 1], (1,)),
        ("message", "m" * 20_000, "m" * 10_000),
        ("until", 2.5, 2.5),
        ("until", "2.5", None),
        ("message", "it is odd", "it is odd"),
    ],
)
def test_each_word_of_a_note_has_its_kind(name: str, value: object, read: object) -> None:
    assert getattr(note_from({name: value}), name) == read


@in_loop
async def test_pins_outlive_the_supervisor() -> None:
    store = MemoryStore()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a"), model("b")), World(), runtime, store)
        later = monotonic() + 600
        life.loop.post(PinSet("a", later))
        life.loop.post(PinSet("b", math.inf))
        await life.loop.wait_for(lambda state: len(state.pins) == 2, 5)
        document = json.loads(json.dumps(store.document, allow_nan=False))
        fresh = initial(config_of(model("a"), model("b")), gpu_count=1, epoch_prefix="n")
        assert restore_orders(fresh, document).pins == {"a": later, "b": math.inf}
        await life.drop()


def test_what_operators_ordered_and_what_was_learned_outlives_the_supervisor() -> None:
    fresh = initial(config_of(model("a"), model("b")), gpu_count=1, epoch_prefix="n")
    notes = {
        "a": {"override": str(DISCARD), "residue": 0.25},
        "b": {"override": "x+y", "residue": 1.5},
        "gone": {"override": str(DISCARD), "residue": 0.25},
    }
    document = {"version": VERSION, "models": notes, "manual": True, "pinned": "a"}
    state = restore_orders(fresh, document)
    assert set(state.models) == {"a", "b"}
    a, b = state.models["a"], state.models["b"]
    assert (a.eviction, a.residue, b) == (DISCARD, 0.25, fresh.models["b"])
    assert (state.manual, state.pinned) == (True, "a")
    state = restore_orders(fresh, {"version": VERSION, "manual": 1, "pinned": "gone"})
    assert (state.manual, state.pinned) == (False, None)


def test_damaged_pins_count_as_not_written() -> None:
    assert pins_in({"pins": []}) == {}
    assert pins_in({"pins": {"a": "x", "b": True, "c": 7}}) == {"c": 7.0}
    odd = {"a": 10**400, "b": -(10**400), "c": math.inf, "d": [1], "e": None}
    assert pins_in({"pins": odd}) == {"e": math.inf}


@pytest.mark.parametrize("pinned", [["a"], {"a": 1}, 1, True, None])
def test_a_damaged_pin_pins_nothing(pinned: object) -> None:
    fresh = initial(config_of(model("a")), gpu_count=1, epoch_prefix="n")
    assert restore_orders(fresh, {"version": VERSION, "pinned": pinned}).pinned is None


@pytest.mark.parametrize(
    "damaged",
    [
        {"cuda_pids": [2**40]}, {"cuda_pids": [0]}, {"gpus": [2**40]}, {"gpus": [-1]},
        {"port": 0}, {"port": 2**40}, {"cold_seconds": -1.0},
        {"max_model_len": -1}, {"cold_seconds": 10**400}, {"identity": {"a": 1}},
        {"identity": [[]]}, {"cuda_pids": [True]}, {"canary": ["x", [10**400]]},
    ],
)  # fmt: skip
def test_facts_out_of_range_are_no_facts(damaged: dict[str, object]) -> None:
    with pytest.raises(BadJson, match=next(iter(damaged))):
        EngineFacts.from_json(damaged)


def test_evictions_are_read_as_they_are_printed() -> None:
    assert Eviction.parse(str(OFFLOAD)) == OFFLOAD
    for wrong in ("offload", "offload+", "+stop", "a+b"):
        with pytest.raises(ValueError, match=r"\w"):
            Eviction.parse(wrong)


@in_loop
async def test_the_journal_says_last_that_a_removed_model_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a"), model("b")), World(), runtime, MemoryStore())
        life.loop.post(LoadAsked("a"))
        await life.until_state("a", "serving")
        life.loop.post(ConfigChanged(config_of(model("b"))))
        await life.settled()
        said = [r.getMessage() for r in caplog.records if getattr(r, "model", None) == "a"]
        assert said[-1] == "a: gone, it was removed from the configuration"
        await life.drop()
