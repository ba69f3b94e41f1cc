"""What is seen of the engines that a former supervisor left, and what is asked to see it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import (
    DISCARD,
    OFFLOAD,
    Shop,
    config_of,
    in_loop,
    model,
)

from llmux.config.schema import Config, Eviction, Process, Weights
from llmux.core.adopt import Note, Observation
from llmux.core.plans import park_plan, start_plan
from llmux.core.records import (
    ModelRecord,
    State,
)
from llmux.core.reducer import initial
from llmux.core.states import ModelState
from llmux.errors import DriverError, LlmuxError
from llmux.runtime import reconcile
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.notes import VERSION
from tests.twins.world import GIB, World

SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)


class Found:
    """An engine that a former supervisor left, in some way of being parked."""

    def __init__(self, directory: Path, eviction: Eviction | None, **settings: Any) -> None:
        self.world = World()
        self.shop = Shop(self.world, str(directory))
        self.config = model("a", gpu_memory=0.9, **settings)
        self.eviction = eviction
        self.strangers: dict[int | str, str] = {}  # that listen when it is looked at
        self.unready: set[str] = set()  # then, too

    async def observe(
        self, note: Note | None, residue: float | None = None, **notes: Any
    ) -> tuple[Observation, EngineFacts, list[str]]:
        await self.shop.run(self.config, start_plan(self.config, 60.0))
        if self.eviction is not None:
            await self.shop.run(self.config, park_plan(self.config, self.eviction))
        before = self.shop.executor.instances["a"]
        assert before.handle is not None
        document = {**before.notes(), **notes}
        if note is not None:
            document |= {"state": note.state, "eviction": str(note.eviction), "gpus": [0]}
        record = ModelRecord(self.config, residue=residue)
        state = State(Config(), 1, "e", models=MappingProxyType({"a": record}))
        after = Shop(self.world, self.shop.drivers.places.runtime)
        self.world.calls.clear()
        self.world.strangers |= self.strangers
        self.world.unready |= self.unready
        seen = await reconcile._observe(
            state, after.executor, after.drivers, before.handle, document
        )
        asked = [name.removesuffix(" a") for name in self.world.names()]
        return seen, after.executor.instances["a"].facts, asked


ASKED = ["units.stranger", "engine.healthy", "engine.sleeping"]


@pytest.mark.parametrize(
    ("eviction", "note", "seen", "asked"),
    [
        (None, ModelState.SERVING, {"healthy": True, "sleeping": False}, ASKED),
        (None, None, {"healthy": True, "sleeping": False}, ["cuda.suspended", *ASKED]),
        (OFFLOAD, ModelState.PARKED, {"healthy": True, "sleeping": True}, ASKED),
        (OFFLOAD, ModelState.PARKING, {"healthy": True, "sleeping": True},
         ["cuda.suspended", *ASKED]),
        (OFFLOAD, None, {"healthy": True, "sleeping": True},
         ["cuda.suspended", *ASKED, "gpu.look", "gpu.look"]),
        (Eviction(Weights.OFFLOAD, Process.FREEZE), ModelState.PARKED, {"frozen": True}, []),
        (Eviction(Weights.OFFLOAD, Process.FREEZE), None, {"healthy": True, "sleeping": True},
         ["freezer.thaw", "cuda.suspended", *ASKED, "gpu.look", "gpu.look"]),
        (SUSPEND, None, {"suspended": True}, ["freezer.thaw", "cuda.suspended"]),
    ],
)  # fmt: skip
@in_loop
async def test_an_engine_is_asked_what_it_can_answer_in_the_order_in_which_it_can(
    tmp_path: Path, eviction: Eviction | None, note: ModelState | None,
    seen: dict[str, Any], asked: list[str],
) -> None:  # fmt: skip
    found = Found(tmp_path, eviction)
    told = None if note is None else Note(note, eviction=eviction or OFFLOAD, gpus=(0,))
    none: dict[str, Any] = {} if told else {"gpus": []}
    observed, facts, calls = await found.observe(told, **none)
    expected = Observation("a", False, False, None, observed.note)
    assert observed == replace(expected, **seen)
    assert observed.note.state == note
    assert [call for call in calls if not call.startswith(("output.", "units.watch"))] == asked
    assert ("units.watch" in calls, "output.attach" in calls) == (True, True)
    suspended = bool(seen.get("suspended"))
    assert (bool(facts.cuda_pids), facts.resumed) == (suspended, note in (None, "waking"))


@pytest.mark.parametrize("before", [True, False])
@in_loop
async def test_what_was_resumed_stays_so_in_a_parking_that_was_cut_short(
    tmp_path: Path, before: bool
) -> None:
    parking = Note(ModelState.PARKING, eviction=OFFLOAD)
    _, facts, _ = await Found(tmp_path, None).observe(parking, resumed=before)
    assert facts.resumed is before


@pytest.mark.parametrize("apart", [True, False])
@in_loop
async def test_a_cache_may_be_lost_where_it_can_be_discarded_and_the_state_is_away(
    tmp_path: Path, apart: bool
) -> None:
    arguments = ("--enable-sleep-mode",) if apart else ()
    found = Found(tmp_path, SUSPEND, extra_args=arguments)
    parking = Note(ModelState.PARKING, eviction=SUSPEND)
    found.world.engines.clear()
    observed, facts, _ = await found.observe(parking, cache_discarded=False)
    # frozen and noted: not asked at all
    assert (observed.frozen, facts.cache_discarded) == (True, False)
    other = Found(tmp_path, SUSPEND, extra_args=arguments)
    _, facts, _ = await other.observe(None, cache_discarded=False)
    assert facts.cache_discarded is apart
    awake = Found(tmp_path, None, extra_args=arguments)
    _, facts, _ = await awake.observe(None, cache_discarded=True)
    assert facts.cache_discarded is True
    awake = Found(tmp_path, None, extra_args=arguments)
    _, facts, _ = await awake.observe(None)
    assert facts.cache_discarded is False


@pytest.mark.parametrize(
    ("held", "residue", "half_awake"),
    [(0, None, False), (GIB, None, False), (20 * GIB, None, True), (20 * GIB, 0.5, False)],
)
@in_loop
async def test_one_that_sleeps_and_holds_more_is_half_awake(
    tmp_path: Path, held: int, residue: float | None, half_awake: bool
) -> None:
    found = Found(tmp_path, DISCARD)
    hold = found.world.hold("engine.sleeping")
    looking = asyncio.create_task(found.observe(None, residue, gpus=[]))
    await hold.reached.wait()
    found.world.engines["a"].held = {"context": held}
    hold.release()
    assert (await looking)[0].half_awake is half_awake


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"pid": 1}, False),
        ({"start_ticks": 99}, False),
        ({"pid": None}, True),
        ({"canary": "x"}, True),
    ],
)
@in_loop
async def test_a_note_of_another_process_says_nothing_of_this_one(
    tmp_path: Path, change: dict[str, Any], known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = Found(tmp_path, None)
    serving = Note(ModelState.SERVING)
    observed, facts, _ = await found.observe(serving, **change)
    assert (observed.note.state is ModelState.SERVING) is known
    assert (facts.version is not None) is (change == {})
    assert facts.address is not None and str(facts.address).endswith("/engines/a/api.sock")
    assert facts.gpus == ((0,) if known else ())
    damaged = [line for line in caplog.messages if "cannot use the note of a" in line]
    assert len(damaged) == ("canary" in change)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DriverError("ask", "it", "no bus"), "cannot observe a: cannot ask it: no bus"),
        (LlmuxError("it is odd"), "cannot read of a: it is odd"),
    ],
)
@in_loop
async def test_an_engine_that_cannot_be_looked_at_is_seen_as_not_answering(
    tmp_path: Path, error: LlmuxError, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = Found(tmp_path, None)
    found.world.fail("engine.healthy", error)
    observed, _, _ = await found.observe(Note(ModelState.SERVING))
    assert observed == Observation("a", False, False, None, observed.note)
    assert text in caplog.messages


@in_loop
async def test_one_that_is_not_healthy_is_asked_no_more(tmp_path: Path) -> None:
    found = Found(tmp_path, None)
    found.unready = {"a"}
    observed, _, asked = await found.observe(Note(ModelState.SERVING))
    assert observed == Observation("a", False, False, None, observed.note)
    assert asked[-1] == "engine.healthy"


@in_loop
async def test_an_engine_in_whose_place_another_listens_is_asked_nothing(tmp_path: Path) -> None:
    found = Found(tmp_path, None)
    found.strangers[f"{tmp_path}/engines/a/api.sock"] = "process 7 (nc)"
    observed, _, asked = await found.observe(Note(ModelState.SERVING))
    expected = Observation("a", False, False, None, observed.note, stranger=True)
    assert (observed, asked[-1]) == (expected, "units.stranger")


@in_loop
async def test_a_fault_of_ours_in_a_note_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        def broken(_: object) -> EngineFacts:
            raise RuntimeError("a fault")

        monkeypatch.setattr(EngineFacts, "from_json", broken)
        with pytest.raises(RuntimeError):
            reconcile._facts("a", {})


def test_what_was_noted_is_restored_to_the_models_that_are_there() -> None:
    fresh = initial(config_of(model("a"), model("b")), gpu_count=1, epoch_prefix="n")

    def residues(value: Any) -> float | None:
        notes = {"a": {"residue": value}, "x": {"residue": 0.5}}
        return (
            reconcile.restore_orders(fresh, {"version": VERSION, "models": notes})
            .models["a"]
            .residue
        )

    assert [residues(v) for v in (0.5, 1.0, 1, 0.0, -0.5, 1.01, "x")] == [0.5, 1.0, *[None] * 5]
    state = reconcile.restore_orders(
        fresh, {"version": VERSION, "pins": {"a": 7.0, "x": 7.0}, "models": {}}
    )
    assert (dict(state.pins), state.manual, state.pinned) == ({"a": 7.0}, False, None)
