"""Plans: the way back mirrors the way down, every step is bounded, every ladder ends in a kill."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from core_harness import DISCARD, STOP, model

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.plans import (
    Outcome,
    Plan,
    Step,
    StepKind,
    deepen_plan,
    park_plan,
    resume_park_plan,
    resume_start_plan,
    reuse_plan,
    start_plan,
    stop_plan,
    wake_plan,
    without_image_plan,
)

K = StepKind
MODEL = model("a")
EVICTIONS = [Eviction(w, p) for w, p in itertools.product(Weights, Process)]
PARKED = [e for e in EVICTIONS if e.process is not Process.STOP]
# a step on the way down and the one that takes it back
MIRROR = {
    K.SLEEP: K.WAKE_UP,
    K.COMM_SUSPEND: K.COMM_RESUME,
    K.FREEZE: K.THAW,
    K.CUDA_SUSPEND: K.CUDA_RESUME,
    K.DUMP: K.RESTORE,
}


def kinds(plan: Plan) -> list[StepKind]:
    return [step.kind for step in plan.steps]


def all_plans() -> list[Plan]:
    return [
        start_plan(MODEL, 600.0),
        resume_start_plan(MODEL, 600.0),
        stop_plan(MODEL),
        stop_plan(MODEL, grace=False),
        *(park_plan(MODEL, eviction) for eviction in EVICTIONS),
        *(wake_plan(MODEL, eviction) for eviction in PARKED),
        reuse_plan(MODEL, Eviction(Weights.DISCARD, Process.CHECKPOINT)),
    ]


@pytest.mark.parametrize("plan", all_plans(), ids=lambda p: f"{p.kind}-{p.eviction}")
def test_every_step_is_bounded_and_every_ladder_ends_in_a_kill_that_is_verified(
    plan: Plan,
) -> None:
    assert all(step.deadline > 0 for step in (*plan.steps, *plan.fallback))
    last = plan.fallback or plan.steps
    assert [step.kind for step in last[-2:]] == [K.KILL, K.VERIFY_RELEASE]
    assert not any(step.optional for step in last[-2:])
    assert plan.deadline == sum(s.deadline for s in (*plan.steps, *plan.fallback))


@pytest.mark.parametrize("eviction", PARKED, ids=str)
def test_the_way_back_mirrors_the_way_down(eviction: Eviction) -> None:
    down = [MIRROR[kind] for kind in kinds(park_plan(MODEL, eviction)) if kind in MIRROR]
    up = [kind for kind in kinds(wake_plan(MODEL, eviction)) if kind in MIRROR.values()]
    if eviction.process is Process.CUDA_SUSPEND:
        assert down == [*down[:-2], K.CUDA_RESUME, K.THAW]  # suspended, then frozen
    once = list(dict.fromkeys(up))  # level 2 wakes in two parts
    assert once == down[::-1]


APART = model("a", extra_args=("--enable-sleep-mode",))


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_a_retained_engine_gives_up_its_kv_cache_before_it_is_saved(eviction: Eviction) -> None:
    saved = eviction.weights is Weights.RETAIN and eviction.process in (
        Process.CUDA_SUSPEND,
        Process.CHECKPOINT,
    )
    down = park_plan(APART, eviction)
    assert (kinds(down)[:1] == [K.DISCARD_CACHE]) is saved
    assert all(step.optional for step in down.steps if step.kind is K.DISCARD_CACHE)
    assert K.DISCARD_CACHE not in kinds(park_plan(MODEL, eviction)), "vLLM's default allocator"
    if eviction.process is Process.STOP:
        return
    for configured in (APART, MODEL):  # the configuration may have changed since
        up = kinds(wake_plan(configured, eviction))
        assert (K.RETURN_CACHE in up) is saved
        if saved:
            assert up.index(K.CUDA_RESUME) < up.index(K.RETURN_CACHE) < up.index(K.CANARY_CHECK)


def test_an_engine_whose_cuda_state_is_away_is_not_asked_for_its_cache() -> None:
    retained = [Eviction(Weights.RETAIN, p) for p in (Process.CUDA_SUSPEND, Process.CHECKPOINT)]
    assert K.DISCARD_CACHE not in kinds(deepen_plan(APART, *retained))
    resumed = resume_park_plan(APART, retained[1], asleep=False, suspended=True)
    assert K.DISCARD_CACHE not in kinds(resumed)


@pytest.mark.parametrize("eviction", PARKED, ids=str)
def test_nobody_is_let_in_before_the_woken_engine_is_verified(eviction: Eviction) -> None:
    assert kinds(wake_plan(MODEL, eviction))[-2:] == [K.WAIT_HEALTHY, K.CANARY_CHECK]
    unverified = wake_plan(model("a", canary=False), eviction)
    assert kinds(unverified)[-1] is K.WAIT_HEALTHY


@pytest.mark.parametrize("process", [p for p in Process if p is not Process.STOP])
def test_level_two_wakes_weights_then_reloads_then_the_cache(process: Process) -> None:
    plan = wake_plan(MODEL, Eviction(Weights.DISCARD, process))
    chosen = {K.WAKE_UP, K.RELOAD_WEIGHTS, K.RESET_PREFIX_CACHE}
    assert [(s.kind, s.tags) for s in plan.steps if s.kind in chosen] == [
        (K.WAKE_UP, ("weights",)),
        (K.RELOAD_WEIGHTS, ()),
        (K.WAKE_UP, ("kv_cache",)),
        (K.RESET_PREFIX_CACHE, ()),
    ]


CHECKPOINTED = Eviction(Weights.DISCARD, Process.CHECKPOINT)


@pytest.mark.parametrize(
    ("plan", "may_fail"),
    [
        (start_plan(MODEL, 600.0), [K.DESCRIBE]),
        (wake_plan(MODEL, DISCARD), [K.RESET_PREFIX_CACHE]),
        (park_plan(MODEL, DISCARD), []),
        (park_plan(MODEL, CHECKPOINTED), [K.RESET_PREFIX_CACHE, K.LEAVE_CLAIM]),
        (stop_plan(MODEL), [K.LEAVE_GPU, K.TERMINATE]),
    ],
    ids=["start", "wake", "sleep", "dump", "stop"],
)
def test_what_may_fail_and_is_passed_over(plan: Plan, may_fail: list[StepKind]) -> None:
    assert [step.kind for step in plan.steps if step.optional] == may_fail


def test_what_has_an_image_already_is_not_asked_politely() -> None:
    plan = reuse_plan(MODEL, CHECKPOINTED)
    assert kinds(plan) == [K.LEAVE_GPU, K.KILL, K.VERIFY_RELEASE]
    assert plan.success is Outcome.PARKED
    assert plan.fallback == stop_plan(MODEL, grace=False).steps


RETAIN_CHECKPOINT = Eviction(Weights.RETAIN, Process.CHECKPOINT)
RETAINED = model("a", eviction=RETAIN_CHECKPOINT)


def test_one_that_is_well_is_given_the_time_of_a_suspend_to_leave() -> None:
    """80 GB take 45 s: cut off at 30 s it would be killed with its state on the GPU."""
    slow, quick = replace(MODEL, sleep_timeout_secs=200.0), replace(MODEL, sleep_timeout_secs=5.0)
    assert [
        step.deadline
        for plan in (stop_plan(slow), stop_plan(quick), stop_plan(slow, grace=False))
        for step in plan.steps
        if step.kind is K.LEAVE_GPU
    ] == [200.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("steps", "level"),
    [
        (reuse_plan(MODEL, CHECKPOINTED).steps, 2),
        (stop_plan(MODEL).steps, 2),
        (park_plan(MODEL, STOP).steps, 2),
        (reuse_plan(MODEL, CHECKPOINTED).fallback, 0),  # something failed: it may answer nothing
        (stop_plan(MODEL).fallback, 0),
        (stop_plan(MODEL, grace=False).steps, 0),
        (park_plan(MODEL, STOP).fallback, 0),
        (park_plan(MODEL, CHECKPOINTED).fallback, 0),
        (reuse_plan(RETAINED, RETAIN_CHECKPOINT).steps, 0),  # started without sleep mode
        (stop_plan(RETAINED).steps, 0),
    ],
)
def test_an_engine_that_is_well_leaves_its_gpu_asleep(steps: tuple[Step, ...], level: int) -> None:
    assert [step.level for step in steps if step.kind is K.LEAVE_GPU] == [level]


@pytest.mark.parametrize("suspended", [False, True])
def test_an_engine_that_stays_after_a_failed_dump_is_not_asked_politely(suspended: bool) -> None:
    plan = without_image_plan(MODEL, DISCARD, suspended=suspended)
    assert plan is not None
    assert plan.fallback == stop_plan(MODEL, grace=False).steps


def test_only_a_checkpoint_makes_an_image() -> None:
    dumping = [e for e in EVICTIONS if park_plan(MODEL, e).dumps]
    assert dumping == [e for e in EVICTIONS if e.process is Process.CHECKPOINT]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "present", [p for p in Process if p not in (Process.STOP, Process.CHECKPOINT)]
)
def test_what_is_parked_goes_deeper_by_what_it_has_not_done(present: Process, ranks: int) -> None:
    model = ModelConfig(
        "m",
        "org/m",
        extra_args=("--tensor-parallel-size", str(ranks)),
        allow_tensor_parallel_parking=True,
    )
    plan = deepen_plan(
        model,
        Eviction(Weights.OFFLOAD, present),
        Eviction(Weights.OFFLOAD, Process.CHECKPOINT),
    )
    thawed = [] if present is Process.KEEP_RUNNING else [K.THAW]
    asked = [K.RESET_PREFIX_CACHE, *([K.COMM_SUSPEND] if ranks > 1 else []), K.CUDA_SUSPEND]
    suspended = [] if present is Process.CUDA_SUSPEND else asked
    assert kinds(plan) == [*thawed, *suspended, K.LEAVE_CLAIM, K.DUMP, K.VERIFY_RELEASE]


def test_the_sleep_level_follows_the_weights() -> None:
    def levels(weights: Weights) -> list[int]:
        plan = park_plan(MODEL, Eviction(weights, Process.KEEP_RUNNING))
        return [step.level for step in plan.steps if step.kind is K.SLEEP]

    assert [levels(weights) for weights in Weights] == [[], [1], [2]]


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_parking_that_frees_gpu_memory_is_seen_to_free_it(eviction: Eviction) -> None:
    keeps = eviction.weights is Weights.RETAIN and eviction.process in (
        Process.KEEP_RUNNING,
        Process.FREEZE,
    )
    assert (K.VERIFY_RELEASE in kinds(park_plan(MODEL, eviction))) is not keeps


def test_stop_as_a_way_of_parking_ends_with_no_process() -> None:
    plan = park_plan(MODEL, STOP)
    assert plan.success is Outcome.DOWN
    assert kinds(plan) == [K.LEAVE_GPU, K.TERMINATE, K.KILL, K.VERIFY_RELEASE]
    assert plan.steps[0].optional  # what cannot be suspended is killed all the same
    assert plan.steps[1].optional  # what does not end at SIGTERM is killed
    assert plan.steps[1].deadline == MODEL.stop_grace_secs


def test_an_engine_that_died_is_not_asked_politely() -> None:
    assert kinds(stop_plan(MODEL, grace=False)) == [K.LEAVE_GPU, K.KILL, K.VERIFY_RELEASE]


def test_a_cold_start_records_what_a_wake_is_compared_with() -> None:
    assert kinds(start_plan(MODEL, 600.0)) == [
        K.SPAWN,
        K.WAIT_HEALTHY,
        K.DESCRIBE,
        K.CANARY_RECORD,
        K.CANARY_SAMPLE,
    ]
    asked = {K.CANARY_RECORD, K.CANARY_SAMPLE}
    assert not asked & set(kinds(start_plan(model("a", canary=False), 600.0)))
    assert K.CANARY_SAMPLE not in kinds(wake_plan(MODEL, DISCARD)), "once, after a cold start"
    assert start_plan(MODEL, 77.0).steps[1].deadline == 77.0


def test_taking_a_start_over_does_not_spawn_again() -> None:
    assert resume_start_plan(MODEL, 60.0).steps == start_plan(MODEL, 60.0).steps[1:]


def test_the_operator_s_time_outs_are_the_deadlines() -> None:
    slow = model("a", sleep_timeout_secs=7.0, wake_timeout_secs=9.0)
    assert [s.deadline for s in park_plan(slow, DISCARD).steps if s.kind is K.SLEEP] == [7.0]
    wakes = [s.deadline for s in wake_plan(slow, DISCARD).steps if s.kind is K.WAKE_UP]
    assert wakes == [9.0, 9.0]


@pytest.mark.parametrize("process", [Process.CUDA_SUSPEND, Process.CHECKPOINT])
def test_the_communicators_of_several_workers_go_before_cuda_and_come_back_after_it(
    process: Process,
) -> None:
    model = ModelConfig(
        "m",
        "org/m",
        extra_args=("--tensor-parallel-size", "2"),
        allow_tensor_parallel_parking=True,
    )
    eviction = Eviction(Weights.DISCARD, process)
    park = [step.kind for step in park_plan(model, eviction).steps]
    wake = [step.kind for step in wake_plan(model, eviction).steps]
    assert park.index(StepKind.SLEEP) < park.index(StepKind.COMM_SUSPEND)
    assert park.index(StepKind.COMM_SUSPEND) < park.index(StepKind.CUDA_SUSPEND)
    assert wake.index(StepKind.CUDA_RESUME) < wake.index(StepKind.COMM_RESUME)
    assert wake.index(StepKind.COMM_RESUME) < wake.index(StepKind.WAKE_UP)


def test_a_single_worker_has_no_communicators_to_suspend() -> None:
    kinds = {
        step.kind for step in park_plan(MODEL, Eviction(Weights.RETAIN, Process.CHECKPOINT)).steps
    }
    assert StepKind.COMM_SUSPEND not in kinds
