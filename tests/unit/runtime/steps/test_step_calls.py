"""Each step of a plan alone: exactly which calls of the drivers it is, and with which deadline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from drivers_called import ADDRESS, CANARY, CONFIG, HANDLE, Bench
from runtime_harness import in_loop

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import RunPlan
from llmux.core.plans import Step, StepKind, start_plan, wake_plan
from llmux.engines import ENGINE_TYPES
from llmux.errors import CheckpointFailed, EngineUnhealthy, LlmuxError, Unsupported
from llmux.ports import GpuProcess, UnitHandle
from llmux.protocol import Address
from llmux.runtime.engines import cuda as module
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.steps import LOOK_SECS, Steps

K = StepKind
ABOUT = pytest.approx(900.0, 0.5)  # what is left of it


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        (Step(K.WAIT_HEALTHY, 9.0),
         [("engine.wait_healthy", ADDRESS, 9.0), ("units.stranger", ADDRESS, HANDLE)]),
        (Step(K.CANARY_RECORD, 9.0), [("engine.canary", ADDRESS, "a", 9.0)]),
        (Step(K.CANARY_SAMPLE, 9.0), [("engine.sample", ADDRESS, "a", 9.0)]),
        (Step(K.CANARY_CHECK, 9.0), [("engine.canary", ADDRESS, "a", 9.0)]),
        (Step(K.SLEEP, 9.0, level=2), [("engine.sleep", ADDRESS, 2, 9.0)]),
        (Step(K.RELOAD_WEIGHTS, 9.0), [("engine.reload_weights", ADDRESS, 9.0)]),
        (Step(K.RESET_PREFIX_CACHE, 9.0), [("engine.reset_prefix_cache", ADDRESS, 9.0)]),
        (Step(K.DISCARD_CACHE, 9.0),
         [("engine.reset_prefix_cache", ADDRESS, 9.0), ("engine.discard_cache", ADDRESS, 9.0)]),
        (Step(K.RETURN_CACHE, 9.0), [("engine.return_cache", ADDRESS, 9.0)]),
        (Step(K.COMM_SUSPEND, 9.0), [("engine.communicators", ADDRESS, False, 9.0)]),
        (Step(K.COMM_RESUME, 9.0), [("engine.communicators", ADDRESS, True, 9.0)]),
        (Step(K.CUDA_SUSPEND, 9.0),
         [("units.pids", HANDLE), ("cuda.check_memory", [77, 78], 0),
          ("cuda.suspend", [77, 78], 9.0)]),
        (Step(K.FREEZE, 9.0), [("freezer.freeze", HANDLE, 9.0)]),
        (Step(K.THAW, 9.0), [("freezer.thaw", HANDLE, 9.0)]),
        (Step(K.TERMINATE, 9.0), [("units.terminate", HANDLE, 9.0)]),
        (Step(K.LEAVE_GPU, 900.0, level=2),
         [("freezer.frozen", HANDLE), ("engine.sleep", ADDRESS, 2, 5.0), ("units.pids", HANDLE),
          ("cuda.check_memory", [77, 78], 0), ("cuda.suspend", [77, 78], ABOUT)]),
        (Step(K.KILL, 9.0),
         [("units.unwatch", HANDLE), ("checkpointer.shm_names", HANDLE),
          ("units.kill", HANDLE, 9.0), ("checkpointer.remove_shm", "a", ("x",)),
          ("checkpointer.confirm_restore", "a"), ("output.detach", "a")]),
        (Step(K.LEAVE_CLAIM, 9.0), []),
        (Step(K.VERIFY_RELEASE, 9.0), []),
        (Step(K.DESCRIBE, 9.0),
         [("engine.describe", ADDRESS, 9.0), ("units.pids", HANDLE),
          ("cuda.suspendable", [77, 78], LOOK_SECS), ("checkpointer.obstacle", HANDLE, [77])]),
    ],
    ids=lambda one: one.kind if isinstance(one, Step) else "",
)  # fmt: skip
@in_loop
async def test_a_step_is_these_calls_in_this_order(step: Step, calls: list[Any]) -> None:
    assert await Bench().run(step) == calls


@in_loop
async def test_a_wake_looks_for_room_before_its_first_part_only() -> None:
    plan = wake_plan(CONFIG, Eviction(Weights.DISCARD, Process.KEEP_RUNNING))
    first, *others = [step for step in plan.steps if step.kind is K.WAKE_UP]
    assert others
    for step, looks in ((first, True), (others[0], False)):
        bench = Bench(gpu_available=True)
        await bench.run(step, plan)
        assert ("gpu.totals",) in bench.seen if looks else ("gpu.totals",) not in bench.seen
        assert ("engine.wake", ADDRESS, step.tags, step.deadline) == bench.seen[-1]


@in_loop
async def test_an_engine_is_started_once_all_that_must_be_seen_was_seen(tmp_path: Any) -> None:
    bench = Bench()
    started: list[str] = []

    async def cuda_started() -> None:
        started.append(str(bench.seen[-1][0]))

    bench.without(cuda_started=cuda_started)
    former = EngineFacts(canary=CANARY, cold_seconds=33.0, gpus=(0,), resumed=True)
    bench.instance.facts, bench.instance.used_before = former, {1: 2}
    await bench.run(Step(K.SPAWN, 9.0), start_plan(CONFIG, 60.0))
    names = [call[0] for call in bench.seen]
    assert names == [
        "output.paths", "units.stranger", "checkpointer.free_shm", "units.start",
        "output.attach", "units.watch",
    ]  # fmt: skip
    assert started == ["units.stranger"]
    spec, deadline = bench.seen[3][1:]
    assert (spec.model, deadline, bench.seen[2][1]) == ("a", 9.0, "a")
    assert bench.seen[1][1:] == (Address(uds="/run/engines/a/api.sock"), None)
    assert bench.seen[4:] == [("output.attach", HANDLE), ("units.watch", HANDLE, bench.exited)]
    facts, instance = bench.instance.facts, bench.instance
    assert (facts.identity, facts.gpus, facts.cold_seconds) == ({"model": "m"}, (0,), 33.0)
    assert facts.address == Address(uds="/run/engines/a/api.sock") and facts.started_as
    assert (facts.canary, facts.resumed) == (None, False)
    assert (instance.handle, instance.used_before) == (HANDLE, {})
    for change, text in (
        ({"model_path": f"{tmp_path}/gone"}, "does not exist"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "MIG-1"}}, "divides whole GPUs"),
    ):
        bench.seen.clear()
        effect = RunPlan("a", 3, start_plan(CONFIG, 60.0), replace(CONFIG, **cast(Any, change)))
        with pytest.raises(LlmuxError, match=text):
            await bench.steps.run(Step(K.SPAWN, 9.0), effect, bench.instance)
        assert "units.start" not in [call[0] for call in bench.seen]


@pytest.mark.parametrize(
    ("kind", "facts", "handle", "void"),
    [
        (K.DISCARD_CACHE, {"version": "0.32.0"}, HANDLE, False),
        (K.DISCARD_CACHE, {"version": None}, HANDLE, True),
        (K.RETURN_CACHE, {"cache_discarded": True}, HANDLE, False),
        (K.RETURN_CACHE, {"cache_discarded": True}, None, True),
        (K.RETURN_CACHE, {}, HANDLE, True),
        (K.LEAVE_GPU, {"resumed": True}, HANDLE, False),
        (K.LEAVE_GPU, {"resumed": True}, None, True),
        (K.LEAVE_GPU, {}, HANDLE, True),
        (K.KILL, {}, None, False),
    ],
)
def test_a_step_is_void_where_the_engine_was_not_through_what_it_undoes(
    kind: StepKind, facts: dict[str, Any], handle: UnitHandle | None, void: bool
) -> None:
    assert ENGINE_TYPES["vllm"].discards_cache("0.32.0")
    instance = Instance(CONFIG, handle, EngineFacts(**facts))
    assert Steps.is_void(Step(kind, 1.0), instance) is void


@in_loop
async def test_what_a_step_needs_and_lacks_is_named() -> None:
    bench = Bench()
    bench.instance.facts = EngineFacts()
    with pytest.raises(EngineUnhealthy, match='cannot reach model "a": it has no engine'):
        await bench.run(Step(K.SLEEP, 9.0))
    bench.instance.handle = None
    with pytest.raises(EngineUnhealthy, match='cannot act on model "a": it has no unit'):
        await bench.run(Step(K.FREEZE, 9.0))
    for kind in (K.KILL, K.TERMINATE):
        await bench.run(Step(kind, 9.0))
    assert bench.seen == []
    bench.instance.handle = HANDLE
    bench.instance.facts = EngineFacts(address=ADDRESS, cuda_pids=(77,))
    await bench.run(Step(K.TERMINATE, 9.0))
    assert bench.seen == [], "it would wait for its CUDA state"


# ---- CUDA ----------------------------------------------------------------------------------------


@in_loop
async def test_what_a_suspend_moves_is_noted_and_nothing_is_an_error_unless_any_will_do() -> None:
    held = [GpuProcess(0, 77, 5), GpuProcess(0, 78, 2), GpuProcess(0, 9, 100)]
    bench = Bench(gpu_available=True, gpu_processes=held)
    await bench.run(Step(K.CUDA_SUSPEND, 9.0))
    assert ("cuda.check_memory", [77, 78], 7) in bench.seen
    assert (bench.instance.facts.cuda_pids, bench.instance.facts.cuda_bytes) == ((77,), 7)
    bench = Bench(cuda_suspend=[])
    await bench.run(Step(K.CUDA_SUSPEND, 9.0, if_any=True))
    assert bench.instance.facts.cuda_pids == ()
    with pytest.raises(CheckpointFailed, match="none of its processes uses CUDA"):
        await bench.run(Step(K.CUDA_SUSPEND, 9.0))
    bench = Bench()
    bench.without(cuda=None)
    await bench.run(Step(K.CUDA_SUSPEND, 9.0, if_any=True))
    await bench.run(Step(K.CUDA_RESUME, 9.0))
    await bench.run(Step(K.LEAVE_GPU, 9.0, level=2))
    assert bench.seen == []
    with pytest.raises(Unsupported, match='cannot suspend model "a": there is no CUDA driver here'):
        await bench.run(Step(K.CUDA_SUSPEND, 9.0))


@pytest.mark.parametrize(
    ("sleep", "moves"),
    [(None, 5), (EngineUnhealthy("sleep", "a", "500"), 90), (TimeoutError(), 90)],
)
@in_loop
async def test_what_leaves_its_gpu_moves_what_its_sleep_has_left(
    sleep: Exception | None, moves: int
) -> None:
    looks = iter([[GpuProcess(0, 77, 50), GpuProcess(0, 78, 40)], [GpuProcess(0, 77, 5)]])
    bench = Bench(gpu_available=True, gpu_processes=lambda: next(looks), engine_sleep=sleep)
    await bench.run(Step(K.LEAVE_GPU, 900.0, level=2))
    assert ("cuda.check_memory", [77, 78], moves) in bench.seen


@pytest.mark.parametrize(
    ("known", "if_any", "handle", "resumed"),
    [
        ((5, 6), False, HANDLE, (5, 6)),
        ((5, 6), True, HANDLE, (5, 6)),
        ((), False, HANDLE, [77, 78]),
        ((), True, HANDLE, None),
        ((5,), False, None, None),
        ((), False, None, None),
    ],
)
@in_loop
async def test_a_resume_is_of_the_processes_that_were_noted_or_else_of_all(
    known: tuple[int, ...], if_any: bool, handle: UnitHandle | None, resumed: Sequence[int] | None
) -> None:
    bench = Bench()
    bench.instance.handle = handle
    bench.instance.facts = EngineFacts(cuda_pids=known, cuda_bytes=5)
    await bench.run(Step(K.CUDA_RESUME, 900.0, if_any=if_any))
    calls = [call for call in bench.seen if call[0] == "cuda.resume"]
    assert calls == ([] if resumed is None else [("cuda.resume", resumed, ABOUT)])
    facts = bench.instance.facts
    assert facts.resumed is (resumed is not None)
    assert facts.cuda_pids == (() if resumed is not None else known)


@pytest.mark.parametrize(
    ("here", "free", "works"),
    [(0, 6, True), (0, 5, True), (0, 4, False), (3, 2, True), (3, 1, False)],
)
@in_loop
async def test_a_resume_needs_room_for_what_is_not_there_yet(
    here: int, free: int, works: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("llmux.runtime.engines.gpu_memory.ROOM_SECS", 0.0)
        bench = Bench(gpu_available=True, gpu_processes=[GpuProcess(0, 77, here)])
        bench.answers |= {"gpu.totals": {0: 100}, "gpu.used": {0: 100 - free}}
        bench.instance.facts = EngineFacts(cuda_pids=(77,), cuda_bytes=5)
        if works:
            await bench.run(Step(K.CUDA_RESUME, 9.0))
        else:
            with pytest.raises(CheckpointFailed):
                await bench.run(Step(K.CUDA_RESUME, 9.0))
        assert bench.instance.facts.resumed is works


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("level", [0, 2])
@in_loop
async def test_an_engine_leaves_its_gpu_thawed_and_asleep_where_it_can(
    frozen: bool, level: int
) -> None:
    bench = Bench(freezer_frozen=frozen, cuda_suspend=[])
    await bench.run(Step(K.LEAVE_GPU, 9.0, level=level))
    names = [call[0] for call in bench.seen]
    wanted = ["freezer.frozen"] + ["freezer.thaw"] * frozen + ["engine.sleep"] * bool(level)
    assert names == [*wanted, "units.pids", "cuda.check_memory", "cuda.suspend"]
    bench.seen.clear()
    bench.instance.facts = replace(bench.instance.facts, cuda_pids=(77,))
    await bench.run(Step(K.LEAVE_GPU, 9.0, level=level))
    assert bench.seen == [], "it is there already"


@pytest.mark.parametrize(
    ("status", "lost"), [(404, False), (400, False), (499, False), (500, True), (None, True)]
)
@in_loop
async def test_a_cache_is_kept_where_the_engine_knows_no_other_way(
    status: int | None, lost: bool
) -> None:
    fields: dict[str, Any] = {} if status is None else {"status": status}
    bench = Bench(engine_discard_cache=EngineUnhealthy("discard", "it", "no", **fields))
    with pytest.raises(EngineUnhealthy):
        await bench.run(Step(K.DISCARD_CACHE, 9.0))
    assert bench.instance.facts.cache_discarded is lost
    bench = Bench(engine_reset_prefix_cache=EngineUnhealthy("reset", "it", "no"))
    with pytest.raises(EngineUnhealthy):
        await bench.run(Step(K.DISCARD_CACHE, 9.0))
    assert bench.instance.facts.cache_discarded is False, "nothing was unmapped"
    bench = Bench()
    bench.instance.facts = replace(bench.instance.facts, cache_discarded=True)
    await bench.run(Step(K.RETURN_CACHE, 9.0))
    assert bench.instance.facts.cache_discarded is False


@in_loop
async def test_what_leaves_the_gpu_has_what_is_left_of_its_time() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ticks = itertools.count(100.0, 2.5)
        monkeypatch.setattr(module, "monotonic", lambda: next(ticks))
        for deadline, left in ((9.0, 6.5), (1.0, 0.0)):
            bench = Bench()
            bench.instance.facts = replace(bench.instance.facts, resumed=True)
            seen = await bench.run(Step(K.LEAVE_GPU, deadline, level=2))
            assert seen[-1] == ("cuda.suspend", [77, 78], left)
