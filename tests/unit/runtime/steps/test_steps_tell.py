"""What a step sees on its way, keeps of the engine, and tells the core."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from drivers_called import CANARY, CHECKPOINT, CONFIG, GIB, HANDLE, Bench
from runtime_harness import OFFLOAD, STOP, in_loop

from llmux.core.effects import RunPlan
from llmux.core.events import AwakeSeen, GpuReleased, ResidueSeen
from llmux.core.plans import Step, StepKind, park_plan, start_plan
from llmux.errors import DriverError, EngineUnhealthy
from llmux.ports import Canary, GpuProcess
from llmux.runtime.engines.gpu_memory import SLACK_BYTES
from llmux.runtime.engines.steps import ROOM_BYTES

K = StepKind


# ---- what the core is told -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pids", "available", "told"),
    [
        ((), None, False),
        ((77,), None, True),
        ((77,), ROOM_BYTES, True),
        ((77,), ROOM_BYTES - 1, False),
    ],
)
@in_loop
async def test_a_claim_ends_where_there_is_host_memory_for_the_next_model(
    pids: tuple[int, ...], available: int | None, told: bool
) -> None:
    bench = Bench()
    if available is not None:
        bench.without(available_memory=lambda: available)
    bench.instance.facts = replace(bench.instance.facts, cuda_pids=pids)
    await bench.run(Step(K.LEAVE_CLAIM, 9.0))
    assert bench.told == ([GpuReleased("a", 3)] if told else [])


@in_loop
async def test_what_a_sleep_leaves_and_what_an_engine_holds_awake_are_told() -> None:
    held = 3 * GIB
    bench = Bench(gpu_available=True, gpu_processes=[GpuProcess(0, 77, held)])
    plan = park_plan(CONFIG, OFFLOAD)
    await bench.run(Step(K.VERIFY_RELEASE, 9.0), plan)
    assert bench.told == [ResidueSeen("a", 3, 0.03)]
    assert bench.instance.used_before == {77: held}
    bench.told.clear()
    await bench.run(Step(K.VERIFY_RELEASE, 0.0), replace(park_plan(CONFIG, OFFLOAD)))
    effect = RunPlan("a", 3, plan, CONFIG, (0,))
    bench.told.clear()
    await bench.steps.learn_awake(effect, bench.instance)
    assert bench.told == [AwakeSeen("a", 3, 0.03)]
    bench.told.clear()
    unseen: list[Any] = [[], DriverError("look", "it", "no")]
    for answer in unseen:
        bench.answers["gpu.processes"] = answer
        await bench.steps.learn_awake(effect, bench.instance)
    bench.instance.handle = None
    await bench.steps.learn_awake(effect, bench.instance)
    assert bench.told == [] and SLACK_BYTES == GIB


@in_loop
async def test_an_answer_is_compared_with_the_first_and_kept() -> None:
    bench = Bench()
    await bench.run(Step(K.CANARY_CHECK, 9.0))
    assert bench.instance.facts.canary == CANARY
    bench.answers["engine.canary"] = Canary("Rome", (-0.5,))
    with pytest.raises(EngineUnhealthy, match="answered 'Rome' instead of 'Paris'"):
        await bench.run(Step(K.CANARY_CHECK, 9.0))
    assert bench.instance.facts.canary == CANARY
    await bench.run(Step(K.CANARY_RECORD, 9.0))
    assert bench.instance.facts.canary == Canary("Rome", (-0.5,))


@pytest.mark.parametrize(
    ("config", "drivers", "asked"),
    [
        (CONFIG, {}, True),
        (CONFIG, {"cuda": None}, True),
        (CONFIG, {"checkpointer": None}, False),
        (replace(CONFIG, eviction=STOP), {}, False),
    ],
)
@in_loop
async def test_obstacles_to_an_image_are_looked_for_where_images_are_made(
    config: Any, drivers: dict[str, Any], asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(checkpointer_obstacle="a socket", cuda_suspendable=DriverError("x", "y", "z"))
    bench.without(**drivers)
    effect = RunPlan("a", 3, start_plan(config, 60.0), config, (0,))
    await bench.steps.run(Step(K.DESCRIBE, 9.0), effect, bench.instance)
    calls = [call for call in bench.seen if call[0] == "checkpointer.obstacle"]
    assert calls == ([("checkpointer.obstacle", HANDLE, None)] if asked else [])
    assert any("cannot be checkpointed as it is now" in line for line in caplog.messages) is asked
    facts = bench.instance.facts
    assert (facts.max_model_len, facts.version) == (7, "0.32.0")


@in_loop
async def test_images_are_dumped_and_restored_with_the_steps_deadlines() -> None:
    bench, given = Bench(), list[Any]()

    async def dump(*args: Any) -> None:
        given.append(args)

    async def restore(*args: Any) -> str:
        given.append(args)
        return "image"

    bench.steps._images = cast(Any, SimpleNamespace(dump=dump, restore=restore))
    await bench.run(Step(K.DUMP, 9.0))
    await bench.run(Step(K.RESTORE, 8.0))
    assert given == [
        (bench.instance, CHECKPOINT, 9.0), (bench.instance, (0,), 8.0, "take over"),
    ]  # fmt: skip
    assert cast(Any, bench.instance.image) == "image"
    assert [call[0] for call in bench.seen] == ["output.attach", "units.watch"]
