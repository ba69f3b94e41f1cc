"""The loop between events, and the lines of the journal that say which requests came."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import OFFLOAD, STOP, begin_life, config_of, in_loop, model

from llmux.config.schema import Config
from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.effects import RunPlan
from llmux.core.events import LoadAsked
from llmux.core.plans import park_plan
from llmux.core.records import State
from llmux.errors import DriverError
from llmux.ports import GpuProcess
from llmux.runtime.arrivals import EVERY_SECS, ArrivalLog
from llmux.runtime.engines.gpu_memory import verify_release
from tests.twins.disk import MemoryStore
from tests.twins.gpu import MemoryGpu
from tests.twins.world import World


@in_loop
async def test_the_loop_does_not_turn_while_nothing_happens(tmp_path: Path) -> None:
    life = await begin_life(config_of(model("a")), World(), str(tmp_path), MemoryStore())
    life.loop.post(LoadAsked("a"))
    await life.until_state("a", "serving")
    await life.settled()
    for _ in range(20):
        await asyncio.sleep(0)
    turned = life.loop.turned
    for _ in range(100):
        await asyncio.sleep(0)
    assert life.loop.turned == turned
    life.demand("a", in_flight=1)
    await life.until(lambda state: state.in_flight("a") == 1)
    assert life.loop.turned > turned
    await life.drop()


def state_of(**demands: WorkerDemand) -> State:
    worker = Worker(demands=MappingProxyType(demands))
    return State(Config(), 1, "e", workers=MappingProxyType({"w": worker}))


def test_requests_of_each_model_are_counted_whatever_the_others_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now = [100.0]
    log = ArrivalLog(lambda: now[0])
    still = WorkerDemand(waiting=1)
    before: dict[str, WorkerDemand] = {"a": still, "b": WorkerDemand(), "c": WorkerDemand()}
    after = before | {
        "b": WorkerDemand(waiting=1, in_flight=1),
        "c": WorkerDemand(completed=3),
        "d": WorkerDemand(in_flight=1),
    }
    log.published(state_of(**before), state_of(**after))
    ended = after | {"b": WorkerDemand(completed=2)}  # nobody came
    log.published(state_of(**after), state_of(**ended))
    assert caplog.messages == []
    now[0] += EVERY_SECS
    log.published(state_of(**ended), state_of(**ended))
    counts = [" ".join(message.split()[:2]) for message in caplog.messages]
    assert sorted(counts) == ["b: 2", "c: 3", "d: 1"]


class Looks(MemoryGpu):
    """What process 7 is seen to hold, one look after the other."""

    held: Sequence[int] = ()
    looks = 0

    async def processes(self) -> Sequence[GpuProcess]:
        self.looks += 1
        used = self.held[min(self.looks, len(self.held)) - 1]
        return [GpuProcess(0, 7, used), GpuProcess(0, 8, 1 << 40)]


@pytest.mark.parametrize(
    ("eviction", "held", "looks"),
    [(STOP, (0,), 1), (STOP, (5, 0), 2), (OFFLOAD, (0,), 1)],
    ids=str,
)
@in_loop
async def test_memory_that_is_free_is_not_waited_for(
    eviction: Any, held: Sequence[int], looks: int
) -> None:
    gpu = Looks(World())
    gpu.held = held
    config = model("a")
    effect = RunPlan("a", 1, park_plan(config, eviction), config, (0,))
    before: Mapping[int, int] = {7: 1 << 30}
    assert await verify_release(gpu, effect, before, 20.0) == 0
    assert gpu.looks == looks
    assert await verify_release(gpu, effect, {}, 20.0) == 0
    gpu.held = (5,)
    if eviction is STOP:
        with pytest.raises(DriverError, match="still held after 0 s"):
            await verify_release(gpu, effect, before, 0.0)
