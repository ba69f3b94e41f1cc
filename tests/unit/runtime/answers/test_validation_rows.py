"""What a validation measures, what it judges, and how it leaves the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from desks import desk
from runtime_harness import DISCARD, OFFLOAD, STOP, config_of, in_loop, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import SwitchFinished
from llmux.core.records import ModelRecord, Starting, State, Stopped
from llmux.errors import CheckpointFailed, Reason, TreeState
from llmux.ports import Canary
from llmux.runtime.control import validation as module
from llmux.runtime.control.orders import ignore_progress
from llmux.runtime.control.validation import Validation, _Row
from llmux.runtime.engines.gpu_memory import SLACK_BYTES
from tests.twins.world import GIB

RETAIN = Eviction(Weights.RETAIN, Process.KEEP_RUNNING)
FREEZE = Eviction(Weights.RETAIN, Process.FREEZE)
SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)


@pytest.mark.parametrize(
    ("own", "policies", "trial"),
    [
        (STOP, [STOP], STOP),
        (STOP, [OFFLOAD, STOP], Eviction(Weights.DISCARD, Process.STOP)),
        (OFFLOAD, [DISCARD], OFFLOAD),
        (RETAIN, [SUSPEND], Eviction(Weights.RETAIN, Process.CHECKPOINT)),
        (RETAIN, [CHECKPOINT], Eviction(Weights.DISCARD, Process.CHECKPOINT)),
        (SUSPEND, [CHECKPOINT], Eviction(Weights.DISCARD, Process.CUDA_SUSPEND)),
        (CHECKPOINT, [SUSPEND], CHECKPOINT),
        (OFFLOAD, [FREEZE], OFFLOAD),
    ],
    ids=str,
)
def test_the_engine_is_started_for_all_that_is_tried(
    own: Eviction, policies: list[Eviction], trial: Eviction
) -> None:
    assert Validation._for_all(own, policies) == trial


def test_a_row_has_each_figure_and_passes_without_a_problem() -> None:
    row = _Row(OFFLOAD)
    empty: dict[str, Any] = {
        "policy": str(OFFLOAD), "sleep_secs": None, "wake_secs": None, "gpu_before_bytes": None,
        "gpu_parked_bytes": None, "gpu_woken_bytes": None, "image_bytes": None, "response": None,
        "passed": True, "problems": [],
    }  # fmt: skip
    assert row.as_json() == empty
    full = _Row(
        OFFLOAD, 1.2345, 2.3456, {"before": 1, "parked": 2, "woken": 3}, 4, "match", ["it is odd"]
    )
    assert full.as_json() == empty | {
        "sleep_secs": 1.234, "wake_secs": 2.346, "gpu_before_bytes": 1, "gpu_parked_bytes": 2,
        "gpu_woken_bytes": 3, "image_bytes": 4, "response": "match", "passed": False,
        "problems": ["it is odd"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "woken", "odd"),
    [(100, 50, False), (100, 49, True), (None, 1, False), (100, None, False), (0, 0, False)],
)
@in_loop
async def test_an_engine_that_woke_has_half_of_its_memory_at_the_least(
    before: int | None, woken: int | None, odd: bool
) -> None:
    async with desk() as d:
        row = _Row(OFFLOAD, gpu={"before": before, "woken": woken})
        d.life.validation("a")._judge_woken(row)
        assert bool(row.problems) is odd


@pytest.mark.parametrize(
    ("held", "allowed", "odd"),
    [(5, 5, False), (6, 5, True), (1, 0, True), (None, 5, False), (6, None, False)],
)
def test_memory_that_stays_is_a_problem_above_what_was_promised(
    held: int | None, allowed: int | None, odd: bool
) -> None:
    row = _Row(OFFLOAD, gpu={"parked": held})
    Validation._judge_memory(row, OFFLOAD, allowed)
    assert bool(row.problems) is odd
    for got, word in ((Canary("x", ()), "match"), (Canary("y", ()), "MISMATCH")):
        answered = _Row(OFFLOAD)
        Validation._judge_answer(answered, Canary("x", ()), got)
        assert (answered.response, bool(answered.problems)) == (word, word != "match")


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [(RETAIN, None), (FREEZE, None), (STOP, 0), (SUSPEND, 0), (CHECKPOINT, 0), (OFFLOAD, -1)],
    ids=str,
)
@in_loop
async def test_each_way_of_parking_promises_what_its_plan_may_keep(
    policy: Eviction, allowed: int | None
) -> None:
    async with desk(config_of(model("a", gpu_memory_parked=0.25))) as d:
        await d.ask("load", model="a")
        found = await d.life.validation("a")._allowed(policy)
        assert found == (20 * GIB + SLACK_BYTES if allowed == -1 else allowed)


@in_loop
async def test_each_policy_is_tried_in_turn_and_the_model_is_left_as_it_was_found() -> None:
    async with desk(config_of(model("a"))) as d:
        await d.ask("load", model="a")
        policies = [str(one) for one in (OFFLOAD, STOP, OFFLOAD)]
        result = await d.ask("validate", model="a", policies=policies)
        assert (result["message"], result["model"], result["passed"]) == (
            "Result: ALL PASSED", "a", True,
        )  # fmt: skip
        assert [row["policy"] for row in result["policies"]] == policies[:2], "each once"
        assert all(row["response"] == "match" for row in result["policies"])
        assert d.life.state_of("a") == "serving"
        record = d.life.loop.state.models["a"]
        assert (record.trial, d.life.loop.state.manual) == (None, False)
        assert [type(one).__name__ for one in d.life.loop.listeners] == []
        await d.ask("unload", model="a")
        await d.ask("validate", model="a", policies=[str(OFFLOAD)])
        await d.life.settled()
        assert d.life.state_of("a") == "serving"


@in_loop
async def test_a_parking_and_a_wake_are_measured_by_themselves() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ticks = itertools.count()
        monkeypatch.setattr(module, "monotonic", lambda: 100.0 + 1.2345 * next(ticks))
        async with desk(config_of(model("a"))) as d:
            (row,) = (await d.ask("validate", model="a", policies=[str(OFFLOAD)]))["policies"]
            assert [row["sleep_secs"], row["wake_secs"]] == pytest.approx([1.2345] * 2, abs=0.001)


@in_loop
async def test_a_policy_that_needs_another_start_ends_with_the_engine_stopped() -> None:
    async with desk(config_of(model("a", eviction=STOP))) as d:
        await d.ask("load", model="a")
        result = await d.ask("validate", model="a", policies=[str(OFFLOAD)])
        assert result["passed"]
        assert d.life.state_of("a") == "serving", "it served before"
        await d.ask("unload", model="a")
        await d.ask("validate", model="a", policies=[str(OFFLOAD)])
        assert d.life.state_of("a") == "stopped"
        assert len(d.world.names("units.start")) == 4


@in_loop
async def test_an_image_is_made_anew_measured_and_removed_again() -> None:
    async with desk(config_of(model("a", eviction=SUSPEND))) as d:
        result = await d.ask("validate", model="a", policies=["retain+checkpoint"])
        (row,) = result["policies"]
        assert (row["passed"], row["image_bytes"], row["problems"]) == (True, GIB, [])
        assert d.world.names("checkpointer.discard") == ["checkpointer.discard a"] * 2
        assert d.world.images == {}
    async with desk(config_of(model("a", eviction=CHECKPOINT))) as d:
        await d.ask("validate", model="a", policies=[str(CHECKPOINT)])
        assert d.world.names("checkpointer.discard") == ["checkpointer.discard a"]
        assert "a" in d.world.images, "it is the configured way"


@in_loop
async def test_what_fails_is_a_problem_of_its_row_and_the_others_are_tried() -> None:
    async with desk(config_of(model("a", eviction=CHECKPOINT))) as d:
        d.fail_dump_unharmed("a")
        result = await d.ask("validate", model="a", policies=[str(CHECKPOINT), str(STOP)])
        first, second = result["policies"]
        assert result["message"] == "Result: SOME FAILED" and not result["passed"]
        assert (first["passed"], second["passed"]) == (False, True)
        assert first["problems"] == [
            "parked by discard+cuda_suspend instead: cannot dump a: the disk is full"
        ]
        assert (first["image_bytes"], first["wake_secs"]) == (None, None), "no image was tried"
        error = CheckpointFailed("dump", "a", "its files", tree=TreeState.BROKEN)
        d.world.fail("checkpointer.dump", error)
        (row,) = (await d.ask("validate", model="a", policies=[str(CHECKPOINT)]))["policies"]
        assert [one for one in row["problems"] if one.startswith("not parked: ")]
        assert row["wake_secs"] is None and row["sleep_secs"] is not None
        d.world.fail("checkpointer.restore")
        (row,) = (await d.ask("validate", model="a", policies=[str(CHECKPOINT)]))["policies"]
        assert [one for one in row["problems"] if "not woken but started cold: " in one]
        d.world.fail("units.start")
        await d.ask("unload", model="a")
        await d.ask("image_remove", model="a")
        (row,) = (await d.ask("validate", model="a", policies=[str(STOP)]))["policies"]
        assert row["problems"] and row["sleep_secs"] is None


@pytest.mark.parametrize("demand", [{"in_flight": 1}, {"waiting": 1}])
@in_loop
async def test_a_model_with_requests_is_not_validated(demand: dict[str, int]) -> None:
    async with desk() as d:
        await d.ask("load", model="a")
        d.life.demand("a", **demand)
        await d.life.until(lambda s: bool(s.in_flight("a") or s.waiting("a")))
        refused = await d.refusal("validate", model="a", policies=[str(STOP)])
        assert refused.reason is Reason.ALREADY_RUNNING
        d.life.demand("a")


def test_only_the_reasons_of_this_model_s_cold_starts_are_heard() -> None:
    heard = Validation(None, None, None, "a", ignore_progress)  # type: ignore[arg-type]

    def state(phase: Any, name: str = "a") -> State:
        return State(config_of(), 1, "e", models={name: ModelRecord(model(name), phase)})

    cold = Starting(1, 0.0, "its image failed")
    for old, new, reasons in (
        (state(Stopped()), state(Starting(1, 0.0)), []),
        (state(cold), state(cold), []),
        (state(Stopped(), "b"), state(cold, "b"), []),
        (state(Stopped(), "b"), state(cold), []),
        (state(Stopped()), state(Stopped(1.0, "x")), []),
        (state(Stopped()), state(cold), ["its image failed"]),
    ):
        heard.published(old, new)
        assert heard._reasons == reasons
    heard.switched(SwitchFinished("a", (), True, 0.0, 0.0, 0.0, 0.0))
