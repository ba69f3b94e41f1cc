"""What steps are measured by and given, and what they do without an engine, a path or a driver."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
from drivers_called import ADDRESS, CONFIG, Bench
from runtime_harness import OFFLOAD, Shop, in_loop, in_virtual_time, model

from llmux.core.effects import RestoreAhead
from llmux.core.plans import Outcome, Step, StepKind, park_plan, start_plan, wake_plan
from llmux.ports import Canary
from llmux.protocol import Address
from llmux.runtime.engines import cuda as module
from llmux.runtime.engines.executor import BACKSTOP_SECS
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.engines.launch import engine_argv
from llmux.runtime.engines.restore_ahead import AheadRestorer
from tests.twins.engine import MemoryEngine
from tests.twins.world import World

MODEL = model("a")
START = start_plan(MODEL, 60.0)
K = StepKind


@in_loop
async def test_steps_took_no_longer_than_their_operation_and_it_ends_well(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    for plan in (START, park_plan(MODEL, OFFLOAD), wake_plan(MODEL, OFFLOAD)):
        began = monotonic()
        await shop.run(MODEL, plan)
        seconds = [secs for _, secs in shop.executor.instance(MODEL).phases]
        assert 0.0 < sum(seconds) <= monotonic() - began
        await shop.executor._operations["a"]
        assert shop.posted.empty()


class Late(MemoryEngine):
    """Says a moment after its deadline how it went."""

    late = 0.0

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        await asyncio.sleep(deadline + self.late)
        await super().sleep(address, level, deadline)


@pytest.mark.parametrize(
    ("late", "outcome"),
    [(BACKSTOP_SECS - 1, Outcome.PARKED), (BACKSTOP_SECS + 1, Outcome.DOWN)],
)
@in_virtual_time
async def test_a_driver_has_a_moment_to_say_that_its_time_is_over(
    tmp_path: Path, late: float, outcome: Outcome
) -> None:
    world = World()
    engine = Late(world)
    engine.late = late
    shop = Shop(world, str(tmp_path), engine=engine)
    await shop.run(MODEL, START)
    assert (await shop.run(MODEL, park_plan(MODEL, OFFLOAD))).outcome is outcome


@in_loop
async def test_a_resume_has_what_the_look_for_room_left_of_its_time() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ticks = itertools.count(100.0, 2.5)
        monkeypatch.setattr(module, "monotonic", lambda: next(ticks))
        bench = Bench()
        bench.instance.facts = EngineFacts(cuda_pids=(77,))
        assert (await bench.run(Step(K.CUDA_RESUME, 9.0)))[-1] == ("cuda.resume", (77,), 6.5)


@in_loop
async def test_without_a_unit_its_processes_are_not_asked_for() -> None:
    bench = Bench()
    bench.instance.handle = None
    await bench.run(Step(K.DESCRIBE, 9.0))
    await bench.run(Step(K.CUDA_RESUME, 9.0))
    assert bench.seen == [("engine.describe", ADDRESS, 9.0)]


@in_loop
async def test_an_engine_without_an_address_leaves_its_gpu_awake() -> None:
    bench = Bench()
    bench.instance.facts = EngineFacts(resumed=True)
    names = [call[0] for call in await bench.run(Step(K.LEAVE_GPU, 9.0, level=2))]
    assert names == ["freezer.frozen", "units.pids", "cuda.check_memory", "cuda.suspend"]


@in_loop
async def test_without_a_checkpointer_nothing_is_restored_ahead() -> None:
    bench = Bench()
    bench.without(checkpointer=None)
    restorer = AheadRestorer(
        bench.drivers, ImageLifecycle(bench.drivers, bench.told.append, lambda _: None)
    )
    restorer.begin(RestoreAhead("a", CONFIG, (0,), (), 500.0), [])
    assert len(asyncio.all_tasks()) == 1
    await restorer.close()
    assert bench.seen == []


@pytest.mark.parametrize("own", [(), ("uv", "run", "vllm")])
def test_the_models_own_command_is_used_where_it_has_one(own: tuple[str, ...]) -> None:
    config = replace(CONFIG, vllm_command=own or None)
    words = engine_argv(config, Address(uds="/x"), ("python", "-m", "vllm"))
    assert words[:3] == (own or ("python", "-m", "vllm"))


@pytest.mark.parametrize(
    "facts",
    [
        EngineFacts(address=Address(uds="/x"), canary=Canary("Paris", (-0.5, -1.0))),
        EngineFacts(address=Address(port=7), gpus=(1, 2), cold_seconds=7.0, max_model_len=9),
        EngineFacts(cuda_pids=(7, 8), cuda_bytes=9, resumed=True, identity={"a": "b"}),
        EngineFacts(version="1", started_as="x", cache_discarded=True),
    ],
    ids=str,
)
def test_facts_are_read_as_they_are_written(facts: EngineFacts) -> None:
    assert EngineFacts.from_json(facts.to_json()) == facts
