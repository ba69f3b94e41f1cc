"""What an operation leaves of itself, and what its end or the close of the executor does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from drivers_called import CONFIG, Bench
from runtime_harness import OFFLOAD, STOP, Shop, in_loop, in_virtual_time, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import Probe, ReadWeights
from llmux.core.events import ProbeFinished
from llmux.core.plans import Outcome, Step, StepKind, park_plan, start_plan, stop_plan, wake_plan
from llmux.errors import EngineUnhealthy, MemoryNotReleased
from llmux.ports import Canary, GpuProcess, Vitals
from llmux.protocol import Address
from llmux.runtime.engines import gpu_memory as module
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.vitals import Progress
from tests.twins.engine import MemoryEngine
from tests.twins.world import GIB, World

CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
MODEL = model("a", eviction=CHECKPOINT)
START = start_plan(MODEL, 60.0)
IMAGING, WAKING = park_plan(MODEL, CHECKPOINT), wake_plan(MODEL, CHECKPOINT)
K = StepKind


async def begun(world: World, tmp_path: Path, **drivers: Any) -> Shop:
    shop = Shop(world, str(tmp_path), **drivers)
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP
    return shop


# ---- one after the other -------------------------------------------------------------------------


@in_loop
async def test_each_operation_has_its_own_phases_and_no_step_when_it_is_over(
    tmp_path: Path,
) -> None:
    shop = await begun(World(), tmp_path)
    instance = shop.executor.instance(MODEL)
    assert [name for name, _ in instance.phases] == [step.kind for step in START.steps]
    for plan, call, kind in (
        (park_plan(MODEL, OFFLOAD), "engine.sleep", K.SLEEP),
        (wake_plan(MODEL, OFFLOAD), "engine.wake", K.WAKE_UP),
    ):
        hold = shop.world.hold(call)
        shop.begin(MODEL, plan)
        await hold.reached.wait()
        step = instance.step
        assert step is not None and step.name == kind
        hold.release()
        await shop.ended()
        assert {name for name, _ in instance.phases} <= {step.kind for step in plan.steps}
        assert instance.phases and instance.step is None
        shop.executor.heard("a", "Loading safetensors checkpoint shards: 25% Completed | 1/4 [")
        assert instance.step is None


@in_loop
async def test_an_operation_is_of_the_configuration_that_it_was_ordered_with(
    tmp_path: Path,
) -> None:
    shop = await begun(World(), tmp_path)
    changed = replace(MODEL, env={"X": "1"})
    await shop.run(changed, stop_plan(changed))
    assert shop.executor.instance(MODEL).config is changed


@pytest.mark.parametrize("plan", [park_plan(MODEL, STOP), stop_plan(MODEL)], ids=str)
@in_loop
async def test_an_engine_that_is_down_leaves_no_notes(tmp_path: Path, plan: Any) -> None:
    shop = await begun(World(), tmp_path)
    assert shop.executor.notes("a")["pid"]
    assert (await shop.run(MODEL, plan)).outcome is Outcome.DOWN
    assert shop.executor.notes("a") == {}


@in_loop
async def test_an_image_that_served_is_not_to_blame_for_what_comes_later(tmp_path: Path) -> None:
    world = World()
    shop = await begun(world, tmp_path)
    for plan in (IMAGING, WAKING):
        await shop.run(MODEL, plan)
    world.fail("engine.sleep")
    assert (await shop.run(MODEL, park_plan(MODEL, OFFLOAD))).outcome is Outcome.DOWN
    assert (shop.quarantined, set(world.images)) == ([], {"a"})


@pytest.mark.parametrize("keep", [True, False])
@in_loop
async def test_an_image_stays_after_its_wake_and_spares_a_dump_where_images_are_kept(
    tmp_path: Path, keep: bool
) -> None:
    world = World()
    shop = await begun(world, tmp_path, keep_images=keep)
    for plan in (IMAGING, WAKING):
        await shop.run(MODEL, plan)
    assert set(world.images) == ({"a"} if keep else set())
    assert (await shop.run(MODEL, IMAGING)).outcome is Outcome.PARKED
    assert len(world.names("checkpointer.dump")) == (1 if keep else 2)
    assert (await shop.run(MODEL, WAKING)).outcome is Outcome.UP
    assert world.violations == []


CAUSE = "torch.OutOfMemoryError: CUDA out of memory."


class Hides(MemoryEngine):
    """Says of its fault where it wrote it."""

    async def wait_healthy(self, address: Address, deadline: float) -> None:
        self._world.output["a"] = ["Traceback (most recent call last):", CAUSE]
        raise EngineUnhealthy("start", "it", "/health answered 500, see above", status=500)


@in_loop
async def test_what_an_engine_wrote_behind_its_answer_is_in_the_end_of_its_start(
    tmp_path: Path,
) -> None:
    world = World()
    shop = Shop(world, str(tmp_path), engine=Hides(world))
    ended = await shop.run(MODEL, START)
    assert ended.outcome is Outcome.DOWN
    assert ended.detail.endswith(f"see above: {CAUSE} (see `llmux logs a`)")


# ---- probes --------------------------------------------------------------------------------------


@in_virtual_time
async def test_counters_that_a_probe_saw_are_known_to_the_next(tmp_path: Path) -> None:
    world = World()
    shop = await begun(world, tmp_path)
    instance = shop.executor.instance(MODEL)
    for value, cpu in ((5.0, 10.0), (5.0, 10.0), (6.0, 10.0), (6.0, 0.0)):
        former = instance.progress
        world.vitals["a"] = Vitals(200, running=1, progress=value)
        world.cpu_per_look["a"] = cpu
        shop.executor.probe(Probe("a", "t.1", MODEL, 60.0, stalled=True))
        event = await shop.posted.get()
        assert isinstance(event, ProbeFinished)
        assert (event.error is None) is (cpu > 0)
        assert isinstance(instance.progress, Progress) and instance.progress.value == value
        assert (instance.progress == former) is (former is not None and former.value == value)


# ---- the close -----------------------------------------------------------------------------------


class Slow(MemoryEngine):
    """Whose sleep, once cancelled, takes a while to end."""

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        try:
            await super().sleep(address, level, deadline)
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self._world.record("sleep is over", "a")


@in_loop
async def test_a_closed_executor_does_nothing_any_more(tmp_path: Path) -> None:
    world, reading = World(), asyncio.Event()

    class Reader:
        async def read(self, *_: Any) -> None:
            reading.set()
            await asyncio.Event().wait()

    shop = await begun(world, tmp_path, engine=Slow(world), weights=Reader())
    shop.executor.read_weights(ReadWeights("b", model("b"), (0,)))
    await reading.wait()
    asleep = world.hold("engine.sleep")
    shop.begin(MODEL, park_plan(MODEL, OFFLOAD))
    await asleep.reached.wait()
    await shop.executor.close()
    assert world.names("sleep is over") == ["sleep is over a"]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert shop.posted.empty() and set(world.engines) == {"a"}


@in_virtual_time
async def test_an_operation_that_is_given_up_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    shop = await begun(world, tmp_path)
    asleep = world.hold("engine.sleep")
    shop.begin(MODEL, park_plan(MODEL, OFFLOAD))
    await asleep.reached.wait()
    await shop.run(MODEL, stop_plan(MODEL, grace=False))
    assert "park a is given up before its end" in caplog.messages


# ---- room and release ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "plan", "held", "short"),
    [
        (K.SPAWN, START, 10, True),
        (K.SPAWN, START, 0, True),
        (K.WAKE_UP, wake_plan(CONFIG, OFFLOAD), 10, False),
        (K.WAKE_UP, wake_plan(CONFIG, OFFLOAD), 9, True),
        (K.RETURN_CACHE, START, 10, False),
        (K.RETURN_CACHE, START, 9, True),
    ],
)
@in_virtual_time
async def test_room_is_looked_for_beside_what_the_engine_holds_already(
    kind: StepKind, plan: Any, held: int, short: bool
) -> None:
    """60 of 100 GiB are in use, and the engine takes 50."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        said: list[str] = []
        monkeypatch.setattr(module.log, "warning", lambda text, *a, **_: said.append(text % a))
        bench = Bench(gpu_available=True, gpu_processes=[GpuProcess(0, 77, held * GIB)])
        bench.answers |= {"gpu.totals": {0: 100 * GIB}, "gpu.used": {0: 60 * GIB}}
        step = next((one for one in plan.steps if one.kind is kind), Step(kind, 9.0))
        await bench.run(step, plan)
        assert [line[:29] for line in said] == ["GPU 0 has 40.0 GiB free, and "] * short


@pytest.mark.parametrize("held", [0, 5])
@in_virtual_time
async def test_a_claim_ends_when_the_memory_is_seen_gone(held: int) -> None:
    bench = Bench(gpu_available=True, gpu_processes=[GpuProcess(0, 77, held * GIB)])
    bench.instance.facts = replace(bench.instance.facts, cuda_pids=(77,))
    bench.instance.used_before = {77: 5 * GIB}
    plan = replace(park_plan(CONFIG, CHECKPOINT), eviction=None)
    if held:
        with pytest.raises(MemoryNotReleased):
            await bench.run(Step(K.LEAVE_CLAIM, 9.0), plan)
    else:
        await bench.run(Step(K.LEAVE_CLAIM, 9.0), plan)
    assert len(bench.told) == (not held)


@pytest.mark.parametrize(
    "kind", [K.SLEEP, K.CUDA_SUSPEND, K.DUMP, K.TERMINATE, K.LEAVE_GPU, K.KILL, K.VERIFY_RELEASE]
)
@in_virtual_time
async def test_what_an_engine_holds_is_noted_before_it_goes(kind: StepKind) -> None:
    looks: list[list[str]] = []
    bench = Bench(gpu_available=True, cuda_suspend=[])

    def processes() -> list[GpuProcess]:
        looks.append([call[0] for call in bench.seen])
        return [GpuProcess(0, 77, 7 * GIB), GpuProcess(0, 9, 8)]

    bench.answers["gpu.processes"] = processes
    bench.instance.facts = replace(bench.instance.facts, resumed=True)
    plan = replace(park_plan(CONFIG, CHECKPOINT), eviction=Eviction(Weights.RETAIN, Process.FREEZE))

    async def dump(*_: Any) -> None:
        bench.seen.append(("checkpointer.dump",))

    bench.steps._images = cast(Any, SimpleNamespace(dump=dump))
    await bench.run(Step(kind, 900.0, if_any=True), plan)
    assert bench.instance.used_before == {77: 7 * GIB}
    acts = {"engine.sleep", "cuda.suspend", "units.terminate", "units.kill", "checkpointer.dump"}
    assert not acts & set(looks[0])


@in_loop
async def test_facts_survive_what_they_are_written_into() -> None:
    facts = EngineFacts(canary=Canary("Paris", (-0.5, -1.0)), gpus=(1, 2), cold_seconds=7.0)
    assert EngineFacts.from_json(facts.to_json()) == facts
