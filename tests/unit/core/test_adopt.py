"""What a new supervisor makes of what it finds: every noted state, and none."""

from __future__ import annotations

import pytest
from core_harness import CHECKPOINT, OFFLOAD, config_of, model

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.adopt import Note, Observation, adopt
from llmux.core.effects import Effect, Probe, RunPlan
from llmux.core.events import ImageKnown
from llmux.core.plans import StepKind, resume_wake_plan, wake_plan
from llmux.core.records import Failed, ModelRecord, Parked, Serving, Waking
from llmux.core.reducer import initial
from llmux.core.states import ModelState

S = ModelState


def found(
    note: Note = Note(),  # noqa: B008  # frozen
    *,
    frozen: bool = False,
    healthy: bool = True,
    sleeping: bool | None = False,
    suspended: bool = False,
    half_awake: bool = False,
    name: str = "a",
) -> tuple[ModelRecord, tuple[Effect, ...]]:
    state = initial(config_of(model("a"), model("b")), gpu_count=2, epoch_prefix="new")
    seen = Observation(name, frozen, healthy, sleeping, note, suspended, half_awake)
    adopted, effects = adopt(state, [seen], images=[], now=100.0)
    assert adopted.models["b"].state is S.STOPPED
    return adopted.models[name], effects


def plan_of(effects: tuple[Effect, ...]) -> str:
    (plan,) = [effect for effect in effects if isinstance(effect, RunPlan)]
    return f"{plan.plan.kind} from {plan.plan.steps[0].kind}"


def test_a_serving_engine_goes_on_on_its_epoch() -> None:
    record, effects = found(Note(S.SERVING, "old.7", gpus=(1,)))
    assert isinstance(record.phase, Serving)
    assert record.phase.epoch == "old.7"
    assert record.gpus == (1,)
    assert record.progress_at == 100.0, "it is not taken to have been silent until now"
    assert effects == ()


def test_what_serves_and_what_is_parked_does_so_since_the_same_moment() -> None:
    serving, _ = found(Note(S.SERVING, "old.7", since=40.0))
    parked, _ = found(Note(S.PARKED, eviction=OFFLOAD, since=40.0))
    assert (serving.phase.since, parked.phase.since) == (40.0, 40.0)
    future, _ = found(Note(S.SERVING, "old.7", since=4000.0))
    assert future.phase.since == 100.0


def test_a_failed_model_goes_on_backing_off_no_longer_than_configured() -> None:
    state = initial(config_of(model("a"), backoff_max_secs=60.0), gpu_count=1, epoch_prefix="new")
    note = Note(S.FAILED, since=90.0, until=9000.0, message="it died", failures=3)
    adopted, effects = adopt(state, [], [], 100.0, {"a": note, "gone": note})
    record = adopted.models["a"]
    assert record.phase == Failed(90.0, 160.0, "it died")
    assert not record.phase.held, "its GPU may be given out"
    assert (record.failures, effects) == (3, ())


def test_a_draining_engine_serves_again_but_never_on_the_revoked_epoch() -> None:
    record, _ = found(Note(S.DRAINING, "old.7", OFFLOAD))
    assert isinstance(record.phase, Serving)
    assert record.phase.epoch.startswith("new.")


def test_a_serving_engine_that_does_not_answer_is_asked_for_a_sign_of_life() -> None:
    record, effects = found(Note(S.SERVING, "old.7"), healthy=False, sleeping=None)
    assert record.probing
    assert [type(effect) for effect in effects] == [Probe]


@pytest.mark.parametrize(
    ("state", "after", "plan"),
    [
        (S.STARTING, S.STARTING, "start from wait_healthy"),
        (S.PARKING, S.PARKING, "park from sleep"),
        (S.WAKING, S.WAKING, "wake from wake_up"),
        (S.STOPPING, S.STOPPING, "stop from leave_gpu"),
        (S.FAILED, S.STOPPING, "stop from leave_gpu"),
        (S.STOPPED, S.STOPPING, "stop from leave_gpu"),
    ],
)
def test_what_was_under_way_is_taken_up_where_it_was(
    state: ModelState, after: ModelState, plan: str
) -> None:
    record, effects = found(Note(state, None, OFFLOAD))
    assert record.state is after
    assert plan_of(effects) == plan


@pytest.mark.parametrize("process", [Process.CUDA_SUSPEND, Process.CHECKPOINT])
def test_parking_goes_on_behind_what_is_seen_done(process: Process) -> None:
    note = Note(S.PARKING, None, Eviction(Weights.OFFLOAD, process))
    assert plan_of(found(note)[1]) == "park from sleep"
    next_one = "cuda_suspend" if process is Process.CUDA_SUSPEND else "reset_prefix_cache"
    assert plan_of(found(note, sleeping=True)[1]) == f"park from {next_one}"
    _, effects = found(note, healthy=False, sleeping=None, suspended=True)
    assert plan_of(effects) == "park from cuda_suspend", "it may not answer what comes before"


def test_images_on_disk_are_what_their_models_are_restored_from() -> None:
    state = initial(config_of(model("a"), model("b")), gpu_count=1, epoch_prefix="new")
    images = [ImageKnown("gone", CHECKPOINT, 5), ImageKnown("a", CHECKPOINT, 7)]
    adopted, _ = adopt(state, [], images, now=100.0)
    record = adopted.models["a"]
    assert (record.image, record.image_bytes) == (CHECKPOINT, 7)
    assert adopted.models["b"].image is None


def test_a_note_of_a_parked_engine_that_does_not_say_how_is_no_note() -> None:
    record, _ = found(Note(S.PARKED), sleeping=True)
    assert isinstance(record.phase, Parked)
    assert record.phase.eviction.process is Process.KEEP_RUNNING
    serving, _ = found(Note(S.PARKED))
    assert isinstance(serving.phase, Serving)


def test_a_parked_engine_stays_parked_as_it_was() -> None:
    record, effects = found(Note(S.PARKED, None, OFFLOAD), sleeping=True)
    assert isinstance(record.phase, Parked)
    assert record.phase.eviction == OFFLOAD
    assert effects == ()


def test_a_waking_engine_wakes_by_how_it_was_parked_not_by_its_configuration() -> None:
    noted = Eviction(Weights.DISCARD, Process.KEEP_RUNNING)
    record, _ = found(Note(S.WAKING, None, noted))
    assert isinstance(record.phase, Waking)
    assert record.phase.eviction == noted


# ---- without a note: what is seen counts --------------------------------------------------------


def test_a_frozen_engine_is_parked_and_presumed_asleep_when_it_can_sleep() -> None:
    record, _ = found(frozen=True, healthy=False, sleeping=None)
    assert isinstance(record.phase, Parked)
    assert record.phase.eviction == Eviction(Weights.DISCARD, Process.FREEZE)


def test_an_engine_without_its_cuda_state_is_parked_and_gets_it_back() -> None:
    record, effects = found(healthy=False, sleeping=None, suspended=True)
    assert isinstance(record.phase, Parked)
    assert record.phase.eviction == Eviction(Weights.DISCARD, Process.CUDA_SUSPEND)
    assert effects == ()


def test_a_sleeping_engine_is_parked_and_will_reload_to_be_safe() -> None:
    record, _ = found(sleeping=True)
    assert isinstance(record.phase, Parked)
    assert record.phase.eviction == Eviction(Weights.DISCARD, Process.KEEP_RUNNING)


def test_one_that_holds_more_than_a_sleeping_engine_does_is_started_anew() -> None:
    record, effects = found(sleeping=True, half_awake=True)
    assert record.state is S.STOPPING
    assert plan_of(effects) == "stop from leave_gpu"


def test_a_healthy_engine_serves() -> None:
    record, _ = found()
    assert isinstance(record.phase, Serving)


def test_one_that_does_not_answer_yet_is_waited_for() -> None:
    record, effects = found(healthy=False, sleeping=None)
    assert record.state is S.STARTING
    assert plan_of(effects) == "start from wait_healthy"


def test_an_engine_of_a_model_that_is_not_configured_is_stopped() -> None:
    record, effects = found(name="stranger")
    assert record.removed
    assert plan_of(effects).startswith("stop")


@pytest.mark.parametrize("state", [None, *S])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("healthy", [False, True])
@pytest.mark.parametrize("sleeping", [None, False, True])
@pytest.mark.parametrize("suspended", [False, True])
def test_whatever_is_noted_and_seen_the_result_is_a_state_that_can_go_on(
    state: ModelState | None, frozen: bool, healthy: bool, sleeping: bool | None, suspended: bool
) -> None:
    record, effects = found(
        Note(state, "old.1", OFFLOAD),
        frozen=frozen,
        healthy=healthy,
        sleeping=sleeping,
        suspended=suspended,
    )
    running = [effect.op for effect in effects if isinstance(effect, RunPlan)]
    assert getattr(record.phase, "op", None) == (running[0] if running else None)
    assert not isinstance(record.phase, Failed)


def test_parking_that_had_got_as_far_as_the_freezer_is_done() -> None:
    noted = Eviction(Weights.OFFLOAD, Process.FREEZE)
    record, effects = found(Note(S.PARKING, None, noted), frozen=True, healthy=False, sleeping=None)
    assert isinstance(record.phase, Parked)  # a frozen engine would not answer a /sleep
    assert record.phase.eviction == noted
    assert effects == ()


def test_a_restore_that_was_not_verified_is_begun_anew() -> None:
    """The engine that is there holds the pids of its image, and what it was is not known."""
    record = ModelConfig("alpha", "-", eviction=Eviction(Weights.DISCARD, Process.CHECKPOINT))
    kinds = [step.kind for step in resume_wake_plan(record, record.eviction).steps]
    assert kinds.index(StepKind.KILL) < kinds.index(StepKind.RESTORE)
    frozen = Eviction(Weights.DISCARD, Process.FREEZE)
    assert resume_wake_plan(record, frozen) == wake_plan(record, frozen)
