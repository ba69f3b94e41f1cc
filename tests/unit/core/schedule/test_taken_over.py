"""What a new supervisor makes of each engine, note and image, beside others that it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from core_harness import CHECKPOINT, DISCARD, FREEZE, OFFLOAD, STOP, config_of, model

from llmux.config.schema import Config, Eviction, ModelConfig, Process, Weights
from llmux.core.adopt import Note, Observation, adopt, placement
from llmux.core.effects import Effect, Probe, RunPlan
from llmux.core.events import ImageKnown
from llmux.core.plans import (
    resume_park_plan,
    resume_start_plan,
    resume_wake_plan,
    stop_plan,
)
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
)
from llmux.core.reducer import initial
from llmux.core.states import ModelState as S

NOW = 100.0
A = model("a", gpu_memory=0.4)


def take_over(
    *seen: Observation,
    notes: dict[str, Note] | None = None,
    images: tuple[ImageKnown, ...] = (),
    config: Config | None = None,
) -> tuple[State, tuple[Effect, ...]]:
    known = config or config_of(A, model("b", gpu_memory=0.4), model("c", gpu_memory=0.4))
    state = initial(known, gpu_count=2, epoch_prefix="new")
    return adopt(state, seen, images, NOW, notes or {})


def engine(name: str = "a", note: Note = Note(), **facts: Any) -> Observation:  # noqa: B008  # frozen
    return Observation(
        name, **({"frozen": False, "healthy": True, "sleeping": False} | facts), note=note
    )


def noted(state: S | None, **facts: Any) -> Note:
    return replace(Note(state, "old.7", FREEZE, since=40.0), **facts)


START = resume_start_plan(A, 1800.0)
STOPPED_NOTE = "it was being stopped when the supervisor ended"
AWAY: dict[str, Any] = {"healthy": False, "sleeping": None}


@pytest.mark.parametrize(
    ("seen", "phase", "plan"),
    [
        (engine(note=noted(S.STARTING)), Starting(1, NOW, "adopted while starting"), START),
        (engine(note=noted(S.PARKING), frozen=True), Parked(FREEZE, NOW), None),
        (
            engine(note=noted(S.PARKING, eviction=OFFLOAD), sleeping=True),
            Parking(1, NOW, OFFLOAD),
            resume_park_plan(A, OFFLOAD, asleep=True, suspended=False),
        ),
        (
            engine(note=noted(S.PARKING, eviction=OFFLOAD), sleeping=None),
            Parking(1, NOW, OFFLOAD),
            resume_park_plan(A, OFFLOAD, asleep=False, suspended=False),
        ),
        (
            engine(note=noted(S.PARKING, eviction=CHECKPOINT), suspended=True, **AWAY),
            Parking(1, NOW, CHECKPOINT),
            resume_park_plan(A, CHECKPOINT, asleep=False, suspended=True),
        ),
        (
            engine(note=noted(S.PARKING, eviction=None)),
            Parking(1, NOW, OFFLOAD),  # as configured
            resume_park_plan(A, OFFLOAD, asleep=False, suspended=False),
        ),
        (engine(note=noted(S.WAKING)), Waking(1, NOW, FREEZE), resume_wake_plan(A, FREEZE)),
        *(
            (engine(note=noted(state)), Stopping(1, NOW, STOPPED_NOTE, 0.4), stop_plan(A))
            for state in (S.STOPPING, S.FAILED, S.STOPPED)
        ),
        (
            engine(note=noted(S.SERVING), stranger=True),
            Stopping(1, NOW, "another process listens at its address", 0.4),
            stop_plan(A),
        ),
        (engine(note=noted(S.PARKED)), Parked(FREEZE, 40.0), None),
        (engine(note=noted(S.PARKED, since=400.0)), Parked(FREEZE, NOW), None),
        (engine(note=noted(S.PARKED, since=None)), Parked(FREEZE, NOW), None),
        (engine(note=noted(S.PARKED, eviction=None), sleeping=True), Parked(DISCARD, NOW), None),
        (engine(note=noted(S.SERVING)), Serving("old.7", 40.0), None),
        (engine(note=noted(S.DRAINING)), Serving("new.1", NOW), None),
        (engine(), Serving("new.1", NOW), None),
        (engine(note=noted(None)), Serving("new.1", NOW), None),
        (engine(**AWAY), Starting(1, NOW, "adopted while starting"), START),
        (engine(sleeping=True), Parked(DISCARD, NOW), None),
        (
            engine(sleeping=True, half_awake=True),
            Stopping(1, NOW, "it was being woken, and cannot say how far it has come", 0.4),
            stop_plan(A),
        ),
        (
            engine(note=noted(S.SERVING), frozen=True, **AWAY),
            Parked(FREEZE, NOW),
            None,
        ),
        (
            engine(note=noted(S.DRAINING, eviction=OFFLOAD), suspended=True, **AWAY),
            Parked(Eviction(Weights.OFFLOAD, Process.CUDA_SUSPEND), NOW),
            None,
        ),
        (engine(frozen=True, **AWAY), Parked(replace(DISCARD, process=Process.FREEZE), NOW), None),
        (
            engine(frozen=True, suspended=True, **AWAY),
            Parked(replace(DISCARD, process=Process.CUDA_SUSPEND), NOW),
            None,
        ),
    ],
)  # fmt: skip
def test_what_is_made_of_an_engine(seen: Observation, phase: Phase, plan: Any) -> None:
    state, effects = take_over(seen)
    record = state.models["a"]
    assert record.phase == phase
    expected = (RunPlan("a", 1, plan, A, (0,)),) if plan else ()
    assert tuple(e for e in effects if isinstance(e, RunPlan)) == expected
    assert (record.last_active, record.progress_at, record.gpus) == (NOW, NOW, (0,))
    assert state.models["b"].state is S.STOPPED


def test_one_that_keeps_its_weights_is_not_taken_to_have_discarded_them() -> None:
    kept = model("a", eviction=FREEZE)
    state, _ = take_over(engine(frozen=True, **AWAY), config=config_of(kept))
    assert state.models["a"].phase == Parked(FREEZE, NOW)


@pytest.mark.parametrize(("healthy", "asked"), [(True, 0), (False, 1)])
def test_one_that_served_and_does_not_answer_is_asked(healthy: bool, asked: int) -> None:
    _, effects = take_over(engine(note=noted(S.SERVING), healthy=healthy))
    assert [e.stalled for e in effects if isinstance(e, Probe)] == [False] * asked


@pytest.mark.parametrize(
    ("gpus", "noted_gpus", "where"),
    [((1,), (), (1,)), ((1,), (3,), (3,)), (2, (), (0, 1)), (2, (1, 3), (1, 3))],
)
def test_the_gpus_of_an_engine_are_those_of_its_note(
    gpus: tuple[int, ...] | int, noted_gpus: tuple[int, ...], where: tuple[int, ...]
) -> None:
    assert placement(model("a", gpus=gpus), Note(gpus=noted_gpus)) == where


def test_an_engine_of_no_model_is_ended_and_hides_no_other() -> None:
    state, effects = take_over(engine("ghost"), engine("b", noted(S.SERVING)))
    assert state.models["ghost"].removed
    phase = state.models["ghost"].phase
    assert isinstance(phase, Stopping)
    assert phase.reason == "the model was removed from the configuration"
    assert [e.plan for e in effects if isinstance(e, RunPlan)] == [
        stop_plan(ModelConfig("ghost", "-"))
    ]
    assert state.models["b"].phase == Serving("old.7", 40.0)


def test_notes_of_failures_are_kept_for_those_that_have_no_engine() -> None:
    def failed(**facts: Any) -> Note:
        return Note(S.FAILED, since=90.0, message="it died", failures=3, **facts)

    state, _ = take_over(
        engine("b", failed(until=130.0)),
        notes={
            "ghost": failed(until=130.0), "a": failed(until=130.0), "b": failed(until=130.0),
            "c": Note(S.STOPPED, failures=2),
        },
    )  # fmt: skip
    assert [state.models[name].failures for name in "abc"] == [3, 3, 2]
    assert state.models["a"].phase == Failed(90.0, 130.0, "it died")
    assert [state.models[name].state for name in "bc"] == [S.STOPPING, S.STOPPED]
    assert set(state.models) == set("abc")
    for until, tried in ((None, NOW), (9e9, NOW + 300.0)):
        state, _ = take_over(notes={"a": failed(until=until)})
        assert state.models["a"].phase == Failed(90.0, tried, "it died")


def test_images_are_known_whatever_else_is_on_the_disk() -> None:
    images = (ImageKnown("ghost", CHECKPOINT, 1), ImageKnown("b", CHECKPOINT, 7))
    state, _ = take_over(images=images)
    assert [(r.image, r.image_bytes) for r in state.models.values()] == [
        (None, 0), (CHECKPOINT, 7), (None, 0),
    ]  # fmt: skip


def test_what_fits_of_the_preload_is_wanted_in_its_order() -> None:
    models = (
        model("a", gpu_memory=0.6, gpus=(0,)), model("b", gpu_memory=0.6, gpus=(0,)),
        model("c", gpu_memory=0.4, gpus=(0,)), model("d", gpus=(7,)),
        model("e", gpu_memory=0.2, gpus=2),
    )  # fmt: skip
    config = replace(config_of(*models), preload=("d", "a", "b", "e", "c"))
    state, _ = take_over(config=config)
    assert state.wants == {"a": NOW, "e": NOW}, "c has no room beside both"
    state, _ = take_over(engine("b"), config=config)
    assert state.wants == {}


# ---- what is known at first ---------------------------------------------------------------------


def test_of_a_model_that_is_new_nothing_is_known() -> None:
    record = ModelRecord(A)
    assert record == ModelRecord(
        A, Stopped(0.0, ""), (), None, None, 0, 0.0, 0, 0.0, -float("inf"), False, 0.0, None, 0,
        False, None, 0, None, None, 0.0, None, None, 0.0, False,
    )  # fmt: skip
    assert (record.eviction, record.engine, record.epoch) == (OFFLOAD, A, None)
    trial = replace(record, trial=DISCARD, eviction_override=STOP)
    assert (trial.eviction, trial.engine) == (STOP, replace(A, eviction=DISCARD))
    assert Stopping(1, 2.0, "", 0.4) == Stopping(1, 2.0, "", 0.4, False, False)
    assert Failed(1.0, 2.0, "") == Failed(1.0, 2.0, "", False, 0.0, False)


def test_a_state_begins_with_nothing() -> None:
    config = config_of(A)
    state = initial(config, gpu_count=2, epoch_prefix="new", now=5.0)
    assert state == State(config, 2, "new", {"a": ModelRecord(A, Stopped(5.0))})
    facts = (state.manual, state.pinned, state.memory_short, state.wakeup)
    assert facts == (False, None, False, None)
    assert (state.next_op, state.next_epoch, state.generation) == (1, 1, 0)
    mappings = (
        state.workers, state.demands, state.waiters, state.wants, state.reservations, state.usage,
        state.costs, state.pins,
    )  # fmt: skip
    assert not any(mappings)
