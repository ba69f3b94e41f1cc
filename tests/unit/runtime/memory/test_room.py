"""Before a start, a resume and a wake the whole device is looked at: what is late is waited for,
what stays is named."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from runtime_harness import DISCARD, Shop, in_virtual_time, model

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.effects import RunPlan
from llmux.core.plans import Outcome, park_plan, start_plan, wake_plan
from llmux.errors import Blame, CheckpointFailed, DriverTimeout
from llmux.ports import GpuProcess
from llmux.runtime.engines import gpu_memory
from tests.twins.world import World

GIB = 1 << 30
SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)
CHECKPOINT = Eviction(Weights.RETAIN, Process.CHECKPOINT)
MODEL = model("a")
STRANGER = GpuProcess(0, 4711, 40 * GIB)


class Device:
    """80 GiB; ``used`` is what it says at each look, the last for good."""

    available = True
    blind = None

    def __init__(self, *used: int, error: Exception | None = None) -> None:
        self.looks = list(used)
        self.error = error

    async def gpu_count(self) -> int:
        return 1

    async def processes(self) -> Sequence[GpuProcess]:
        return [STRANGER]

    async def totals(self) -> Mapping[int, int]:
        if self.error is not None:
            raise self.error
        return {0: 80 * GIB}

    async def used(self) -> Mapping[int, int]:
        return {0: (self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]) * GIB}


def warnings(device: Device, caplog: pytest.LogCaptureFixture) -> list[str]:
    config = ModelConfig("alpha", "org/alpha", gpu_memory=0.9)
    effect = RunPlan("alpha", 1, start_plan(config, 60.0), config, (0,))
    with caplog.at_level(logging.WARNING):
        asyncio.run(gpu_memory.wait_for_room(device, effect))
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_room_that_is_there_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(8, 99)
    assert warnings(device, caplog) == []
    assert device.looks == [99]  # one look


def test_a_late_release_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(Device(70, 30, 1), caplog) == []


def test_what_stays_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_memory, "ROOM_SECS", 0.0)
    (said,) = warnings(Device(40), caplog)
    assert said == (
        "GPU 0 has 40.0 GiB free, and alpha will ask for 72.0 GiB: process 4711 holds 40.0 GiB"
        " (stop other programs, or lower gpu_memory)"
    )


@pytest.mark.parametrize(
    "error", [DriverTimeout("look at", "the GPUs", "no answer"), OSError(5, "Input/output error")]
)
def test_a_blind_observer_stands_in_no_ones_way(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.INFO)
    assert warnings(Device(40, error=error), caplog) == []


# ---- before CUDA state comes back ---------------------------------------------------------------


async def parked(world: World, directory: Path, eviction: Eviction) -> Shop:
    """Model a, which holds 72 of 80 GiB awake, parked; process 4711 takes 40 GiB meanwhile."""
    shop = Shop(world, str(directory))
    for plan in (start_plan(MODEL, 60.0), park_plan(MODEL, eviction)):
        await shop.run(MODEL, plan)
    world.foreign[4711] = (0, 40 * GIB)
    world.calls.clear()
    return shop


@pytest.mark.parametrize("eviction", [SUSPEND, CHECKPOINT], ids=str)
@in_virtual_time
async def test_a_resume_without_room_is_not_tried(tmp_path: Path, eviction: Eviction) -> None:
    """An out-of-memory in a resume is final, and the image was blamed for it."""
    world = World()
    shop = await parked(world, tmp_path, eviction)
    ended = await shop.run(MODEL, wake_plan(MODEL, eviction))
    assert ended.outcome is Outcome.DOWN
    assert "GPU 0 has 40.0 GiB free, and a will ask for 72.0 GiB" in ended.detail
    assert "process 4711 holds 40.0 GiB" in ended.detail
    assert world.names("cuda.resume") == []
    assert shop.quarantined == []


@in_virtual_time
async def test_a_resume_of_what_was_never_seen_is_tried_on_a_full_gpu(tmp_path: Path) -> None:
    """Looking never stands before acting: how much would come back is not known."""
    world = World()
    shop = await parked(world, tmp_path, SUSPEND)
    instance = shop.executor.instance(MODEL)
    instance.facts = replace(instance.facts, cuda_bytes=0)
    world.foreign[4711] = (0, 80 * GIB)
    await shop.run(MODEL, wake_plan(MODEL, SUSPEND))
    assert world.names("cuda.resume") == ["cuda.resume a"]


@pytest.mark.parametrize("eviction", [SUSPEND, CHECKPOINT, DISCARD], ids=str)
@in_virtual_time
async def test_a_wake_waits_for_what_is_late(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eviction: Eviction
) -> None:
    world = World()
    shop = await parked(world, tmp_path, eviction)
    asyncio.get_running_loop().call_later(2.0, world.foreign.clear)
    with caplog.at_level(logging.WARNING):
        ended = await shop.run(MODEL, wake_plan(MODEL, eviction))
    assert (ended.outcome, world.violations) == (Outcome.UP, [])
    assert [line for line in caplog.records if line.levelno >= logging.WARNING] == []


@in_virtual_time
async def test_a_wake_without_room_is_the_engine_s_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    shop = await parked(world, tmp_path, DISCARD)
    with caplog.at_level(logging.WARNING):
        ended = await shop.run(MODEL, wake_plan(MODEL, DISCARD))
    assert ended.outcome is Outcome.DOWN
    warning = next(line for line in caplog.records if line.levelno >= logging.WARNING)
    assert "process 4711 holds 40.0 GiB" in warning.getMessage()


@in_virtual_time
async def test_a_resume_that_ran_out_of_memory_does_not_blame_the_image(tmp_path: Path) -> None:
    world = World()
    shop = await parked(world, tmp_path, CHECKPOINT)
    world.foreign.clear()
    full = CheckpointFailed("resume", "process 7", "out of memory", blame=Blame.HOST)
    world.fail("cuda.resume", full)
    assert (await shop.run(MODEL, wake_plan(MODEL, CHECKPOINT))).outcome is Outcome.DOWN
    assert (shop.quarantined, list(world.images)) == ([], ["a"])


@in_virtual_time
async def test_a_resume_without_a_look_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    shop = await parked(world, tmp_path, SUSPEND)
    world.foreign.clear()
    world.fail("gpu.look", always=True)
    with caplog.at_level(logging.INFO):
        ended = await shop.run(MODEL, wake_plan(MODEL, SUSPEND))
    assert ended.outcome is Outcome.UP
    assert any("cannot see the GPUs before the wake of a" in text for text in caplog.messages)
