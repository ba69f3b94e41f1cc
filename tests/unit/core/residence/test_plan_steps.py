"""Every plan step by step: kind, level, tags and deadline of each. ``?``:
it may fail; ``~``: it has nothing to do without CUDA."""

from __future__ import annotations

import itertools

import pytest
from core_harness import CHECKPOINT, DISCARD, FREEZE, OFFLOAD, STOP, model

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.plans import (
    Plan,
    Step,
    StepKind,
    deepen_plan,
    park_plan,
    resume_park_plan,
    resume_start_plan,
    resume_wake_plan,
    reuse_plan,
    start_plan,
    stop_plan,
    wake_plan,
    without_image_plan,
)
from llmux.core.records import keeps_gpu

TIMES = {
    "sleep_timeout_secs": 41.0, "wake_timeout_secs": 42.0, "checkpoint_timeout_secs": 43.0,
    "stop_grace_secs": 44.0,
}  # fmt: skip
ONE = model("a", **TIMES)
TWO = model(
    "a",
    extra_args=("--tensor-parallel-size", "2", "--enable-sleep-mode"),
    allow_tensor_parallel_parking=True,
    **TIMES,
)
SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
SAVED = Eviction(Weights.RETAIN, Process.CHECKPOINT)


def words(steps: tuple[Step, ...]) -> str:
    return ", ".join(
        f"{s.kind}{s.level or ''}{''.join(f'({t})' for t in s.tags)} {s.deadline:g}"
        + "?" * s.optional + "~" * s.if_any
        for s in steps
    )  # fmt: skip


KILL = "leave_gpu 30?, kill 15, verify_release 10"
ASK = "leave_gpu 30?, terminate 44?, kill 15, verify_release 10"
LEAVE = "leave_gpu2 41?, terminate 44?, kill 15, verify_release 10"
SAVE = "leave_claim 3?, dump 43, verify_release 3"
ASKED = "canary_record 60, canary_sample 300"
VERIFIED = "wait_healthy 30, canary_check 60"
RELOAD = "wake_up(weights) 42, reload_weights 42, wake_up(kv_cache) 42, reset_prefix_cache 30?"

# (weights axis, process axis): the way down, the way back
WAYS: dict[tuple[str, str], tuple[str, str]] = {
    ("retain", "keep_running"): ("", VERIFIED),
    ("retain", "freeze"): ("freeze 10", f"thaw 10, {VERIFIED}"),
    ("retain", "cuda_suspend"): (
        "cuda_suspend 41, freeze 10, verify_release 3",
        f"thaw 10, cuda_resume 42, return_cache 42, {VERIFIED}",
    ),
    ("retain", "checkpoint"): (
        f"cuda_suspend 41~, {SAVE}",
        f"restore 43, cuda_resume 42~, return_cache 42, {VERIFIED}",
    ),
    ("offload", "keep_running"): ("sleep1 41, verify_release 3", f"wake_up 42, {VERIFIED}"),
    ("offload", "freeze"): (
        "sleep1 41, freeze 10, verify_release 3",
        f"thaw 10, wake_up 42, {VERIFIED}",
    ),
    ("offload", "cuda_suspend"): (
        "sleep1 41, cuda_suspend 41, freeze 10, verify_release 3",
        f"thaw 10, cuda_resume 42, wake_up 42, {VERIFIED}",
    ),
    ("offload", "checkpoint"): (
        f"sleep1 41, reset_prefix_cache 30?, cuda_suspend 41~, {SAVE}",
        f"restore 43, cuda_resume 42~, wake_up 42, {VERIFIED}",
    ),
    ("discard", "keep_running"): ("sleep2 41, verify_release 3", f"{RELOAD}, {VERIFIED}"),
    ("discard", "freeze"): (
        "sleep2 41, freeze 10, verify_release 3",
        f"thaw 10, {RELOAD}, {VERIFIED}",
    ),
    ("discard", "cuda_suspend"): (
        "sleep2 41, cuda_suspend 41, freeze 10, verify_release 3",
        f"thaw 10, cuda_resume 42, {RELOAD}, {VERIFIED}",
    ),
    ("discard", "checkpoint"): (
        f"sleep2 41, reset_prefix_cache 30?, cuda_suspend 41~, {SAVE}",
        f"restore 43, cuda_resume 42~, {RELOAD}, {VERIFIED}",
    ),
    **dict.fromkeys(itertools.product(Weights, ("stop",)), (LEAVE, "")),
}


@pytest.mark.parametrize(("weights", "process"), list(itertools.product(Weights, Process)))
def test_the_way_down_and_the_way_back(weights: Weights, process: Process) -> None:
    eviction = Eviction(weights, process)
    down, up = WAYS[weights.value, process.value]
    park = park_plan(ONE, eviction)
    assert (park.kind, words(park.steps), park.eviction) == ("park", down, eviction)
    stops = process is Process.STOP
    assert (park.success, words(park.fallback)) == (
        ("down", KILL) if stops else ("parked", ASK)
    )  # fmt: skip
    assert (park.dumps, park.restores) == (process is Process.CHECKPOINT, False)
    if stops:
        return
    wake = wake_plan(ONE, eviction)
    assert (wake.kind, words(wake.steps), wake.success) == ("wake", up, "up")
    assert (words(wake.fallback), wake.eviction) == (KILL, eviction)
    assert (wake.dumps, wake.restores) == (False, process is Process.CHECKPOINT)


@pytest.mark.parametrize(
    ("plan", "kind", "steps", "success", "fallback"),
    [
        (
            start_plan(ONE, 600.0),
            "start",
            f"spawn 30, wait_healthy 600, describe 5?, {ASKED}",
            "up", KILL,
        ),
        (
            resume_start_plan(ONE, 600.0),
            "start",
            f"wait_healthy 600, describe 5?, {ASKED}",
            "up", KILL,
        ),
        (stop_plan(ONE), "stop", LEAVE, "down", KILL),
        (stop_plan(ONE, grace=False), "stop", KILL, "down", KILL),
        (
            reuse_plan(ONE, CHECKPOINT), "park", "leave_gpu2 41?, kill 15, verify_release 10",
            "parked", KILL,
        ),
        (
            resume_wake_plan(ONE, SAVED), "wake",
            f"{KILL}, {WAYS['retain', 'checkpoint'][1]}", "up", KILL,
        ),
        (resume_wake_plan(ONE, SUSPEND), "wake", WAYS["retain", "cuda_suspend"][1], "up", KILL),
    ],
)  # fmt: skip
def test_other_plans(plan: Plan, kind: str, steps: str, success: str, fallback: str) -> None:
    assert (plan.kind, plan.success) == (kind, success)
    assert (words(plan.steps), words(plan.fallback)) == (steps, fallback)


@pytest.mark.parametrize(
    ("eviction", "down", "up"),
    [
        (
            SUSPEND,
            "discard_cache 30?, comm_suspend 60, cuda_suspend 41, freeze 10, verify_release 3",
            f"thaw 10, cuda_resume 42, comm_resume 60, return_cache 42, {VERIFIED}",
        ),
        (
            SAVED,
            f"discard_cache 30?, comm_suspend 60, cuda_suspend 41~, {SAVE}",
            f"restore 43, cuda_resume 42~, comm_resume 60, return_cache 42, {VERIFIED}",
        ),
        (OFFLOAD, "sleep1 41, verify_release 3", f"wake_up 42, {VERIFIED}"),
    ],
)  # fmt: skip
def test_an_engine_of_two_ranks_whose_cache_is_apart(
    eviction: Eviction, down: str, up: str
) -> None:
    assert words(park_plan(TWO, eviction).steps) == down
    assert words(wake_plan(TWO, eviction).steps) == up


def test_what_cannot_be_parked_so_is_stopped() -> None:
    """Its configuration may have changed since."""
    forbidden = model("a", extra_args=("--tensor-parallel-size", "2"), **TIMES)
    plan = park_plan(forbidden, SUSPEND)
    assert (words(plan.steps), plan.success, words(plan.fallback)) == (LEAVE, "down", KILL)
    assert words(park_plan(forbidden, OFFLOAD).steps) == "sleep1 41, verify_release 3"


# ---- the rest of a plan -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "present", "deeper", "steps"),
    [
        (ONE, OFFLOAD, Eviction(Weights.OFFLOAD, Process.FREEZE), "freeze 10, verify_release 3"),
        (
            ONE, Eviction(Weights.OFFLOAD, Process.FREEZE),
            Eviction(Weights.OFFLOAD, Process.CUDA_SUSPEND),
            "thaw 10, cuda_suspend 41, freeze 10, verify_release 3",
        ),
        (
            TWO, FREEZE, SAVED,
            f"thaw 10, discard_cache 30?, comm_suspend 60, cuda_suspend 41~, {SAVE}",
        ),
        (TWO, SUSPEND, SAVED, f"thaw 10, {SAVE}"),
        (
            TWO, Eviction(Weights.DISCARD, Process.CUDA_SUSPEND), CHECKPOINT,
            f"thaw 10, {SAVE}",
        ),
        (
            TWO, DISCARD, CHECKPOINT,
            f"reset_prefix_cache 30?, comm_suspend 60, cuda_suspend 41~, {SAVE}",
        ),
    ],
)  # fmt: skip
def test_what_is_parked_does_what_it_has_not_done(
    config: ModelConfig, present: Eviction, deeper: Eviction, steps: str
) -> None:
    plan = deepen_plan(config, present, deeper)
    assert (words(plan.steps), plan.success, plan.eviction) == (steps, "parked", deeper)
    assert words(plan.fallback) == ASK


@pytest.mark.parametrize(
    ("config", "eviction", "suspended", "steps"),
    [
        (ONE, CHECKPOINT, False, "verify_release 3"),
        (ONE, CHECKPOINT, True, "freeze 10, verify_release 3"),
        (ONE, SAVED, False, ""),
        (ONE, SAVED, True, "freeze 10, verify_release 3"),
        (TWO, CHECKPOINT, False, None),
        (TWO, CHECKPOINT, True, "freeze 10, verify_release 3"),
    ],
)
def test_where_an_engine_stays_whose_image_could_not_be_written(
    config: ModelConfig, eviction: Eviction, suspended: bool, steps: str | None
) -> None:
    plan = without_image_plan(config, eviction, suspended=suspended)
    if plan is None or steps is None:
        assert (plan, steps) == (None, None)
        return
    process = Process.CUDA_SUSPEND if suspended else Process.KEEP_RUNNING
    assert plan.eviction == Eviction(eviction.weights, process)
    assert (plan.kind, words(plan.steps), plan.success) == ("park", steps, "parked")
    assert words(plan.fallback) == KILL


@pytest.mark.parametrize(("weights", "process"), list(itertools.product(Weights, Process)))
@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("suspended", [False, True])
def test_a_park_goes_on_behind_what_was_seen_done(
    weights: Weights, process: Process, asleep: bool, suspended: bool
) -> None:
    """An engine that was to keep running, and that somebody put to sleep, ended the supervisor."""
    whole = park_plan(ONE, Eviction(weights, process))
    kinds = [step.kind for step in whole.steps]
    done = 0
    if suspended and process in (Process.CUDA_SUSPEND, Process.CHECKPOINT):
        done = kinds.index(StepKind.CUDA_SUSPEND)
    elif asleep and weights is not Weights.RETAIN and process is not Process.STOP:
        done = 1
    rest = resume_park_plan(ONE, Eviction(weights, process), asleep=asleep, suspended=suspended)
    assert rest.steps == whole.steps[done:]
    assert (rest.success, rest.fallback) == (whole.success, whole.fallback)


def test_a_stop_is_no_way_to_keep_the_gpu() -> None:
    kept = {FREEZE, Eviction(Weights.RETAIN, Process.KEEP_RUNNING)}
    for weights, process in itertools.product(Weights, Process):
        eviction = Eviction(weights, process)
        assert keeps_gpu(eviction) is (eviction in kept)
    assert not keeps_gpu(STOP)
