"""GPU memory at the edges: what counts as held, as released, as room, and in whose words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from drivers_called import CONFIG, GIB, HANDLE, Bench
from runtime_harness import OFFLOAD, STOP, in_loop, in_virtual_time

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import RunPlan
from llmux.core.plans import park_plan, start_plan
from llmux.errors import Blame, CheckpointFailed, DriverError, MemoryNotReleased
from llmux.ports import GpuProcess
from llmux.runtime.engines import gpu_memory as module
from llmux.runtime.engines.gpu_memory import (
    LOOK_SECS,
    ROOM_SECS,
    SETTLED_SECS,
    SLACK_BYTES,
    awake_share,
    held_before,
    held_by,
    holds_more,
    require_room,
    residue_share,
    total_held,
    verify_release,
    wait_for_room,
    warn_of_claim,
)
from llmux.runtime.engines.host_memory import host_bytes

TOTAL = 100 * GIB
EFFECT = RunPlan("a", 1, start_plan(CONFIG, 60.0), CONFIG, (0,))
NO = DriverError("look at", "the GPUs", "no answer")


def bench_of(*held: GpuProcess, **answers: Any) -> Bench:
    return Bench(gpu_available=True, gpu_processes=list(held), **answers)


@in_loop
async def test_memory_is_summed_by_process_and_where_it_is_not_seen_it_is_unknown() -> None:
    bench = bench_of(
        GpuProcess(0, 77, 5), GpuProcess(1, 77, 2), GpuProcess(0, 78, 1), GpuProcess(0, 9, 100)
    )
    drivers = bench.drivers
    assert await held_by(drivers, HANDLE) == {77: 7, 78: 1}
    assert await held_before(drivers, HANDLE) == {77: 7, 78: 1}
    assert await total_held(drivers, HANDLE) == 8
    bench.seen.clear()
    assert await held_by(drivers) == {} and bench.seen == []
    bench.answers["gpu.processes"] = NO
    assert await held_before(drivers, HANDLE) == {77: 0, 78: 0}
    bench.answers["gpu.available"] = False
    assert (await held_by(drivers, HANDLE), await held_before(drivers, HANDLE)) == ({}, {})
    assert await total_held(drivers, HANDLE) is None
    assert await holds_more(drivers, HANDLE, (0,), 0.0) is False


@pytest.mark.parametrize("error", [NO, OSError(5, "x"), None])
@in_virtual_time
async def test_a_look_that_fails_or_hangs_is_given_up_and_said(error: Exception | None) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        said: list[str] = []
        monkeypatch.setattr(module.log, "warning", lambda text, *a, **_: said.append(text % a))
        bench = bench_of()
        bench.answers["gpu.processes"] = error
        if error is None:

            async def hang() -> Any:
                await asyncio.Event().wait()

            bench.drivers.gpu.processes = hang  # type: ignore[method-assign]
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await held_before(bench.drivers, HANDLE) == {77: 0, 78: 0}
        text = str(error) if error else f"no answer within {LOOK_SECS:g} s"
        assert said == [f"cannot see the GPU memory of a: {text}"]
        assert error is not None or loop.time() - began >= LOOK_SECS


@pytest.mark.parametrize(
    ("held", "totals", "share"),
    [
        (0, {0: 1000}, None),
        (1, {0: 1000}, 0.001),
        (500, {0: 1000}, 0.5),
        (501, {0: 2000}, 0.251),
        (500, {}, None),
        (500, {0: 1000, 1: 9}, 0.5),
    ],
)
@in_loop
async def test_the_share_of_an_engine_is_rounded_up(
    held: int, totals: dict[int, int], share: float | None
) -> None:
    bench = bench_of(GpuProcess(0, 77, held), gpu_totals=totals)
    assert await awake_share(bench.drivers, HANDLE, EFFECT) == share
    effect = replace(EFFECT, plan=park_plan(CONFIG, OFFLOAD))
    assert await residue_share(bench.drivers.gpu, effect, held) == share


@pytest.mark.parametrize(
    ("eviction", "settings", "told"),
    [
        (OFFLOAD, {}, True),
        (OFFLOAD, {"gpu_memory_parked": 0.1}, False),
        (OFFLOAD, {"gpu_memory_parked": 0.0}, False),
        (STOP, {}, False),
        (Eviction(Weights.RETAIN, Process.KEEP_RUNNING), {}, False),
        (Eviction(Weights.OFFLOAD, Process.CUDA_SUSPEND), {}, False),
        (None, {}, False),
    ],
)
@in_loop
async def test_only_a_sleep_s_own_residue_is_learned(
    eviction: Eviction | None, settings: dict[str, Any], told: bool
) -> None:
    config = replace(CONFIG, **settings)
    plan = replace(park_plan(config, eviction or STOP), eviction=eviction)
    effect = RunPlan("a", 1, plan, config, (0,))
    assert (await residue_share(bench_of().drivers.gpu, effect, GIB) is not None) is told


@pytest.mark.parametrize(("share", "said"), [(0.51, None), (0.5101, "51.0"), (0.555, "55.5")])
def test_an_engine_that_holds_more_than_it_claims_is_named(
    share: float, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_claim(CONFIG, share)
    assert len(caplog.messages) == (said is not None)
    if said:
        wanted = {"51.0": "0.52", "55.5": "0.56"}[said]
        assert (
            f"a holds {said} % of its GPUs, and claims 50.0 %: set its gpu_memory to {wanted}"
            in (caplog.messages[0])
        )


@pytest.mark.parametrize(("more", "gpus"), [(0, (0,)), (1, (0,)), (0, (0, 1)), (1, (0, 1))])
@in_loop
async def test_more_is_more_than_the_share_and_the_slack_of_each_gpu(
    more: int, gpus: tuple[int, ...]
) -> None:
    allowed = sum(TOTAL // 10 + SLACK_BYTES for _ in gpus)
    bench = bench_of(GpuProcess(0, 77, allowed + more), gpu_totals={0: TOTAL, 1: TOTAL})
    assert await holds_more(bench.drivers, HANDLE, gpus, 0.1) is bool(more)


# ---- released ------------------------------------------------------------------------------------


class Device:
    """What process 7 is seen to hold as time passes."""

    available = True

    def __init__(self, held: Callable[[float], int]) -> None:
        self.held = held
        self.began = asyncio.get_running_loop().time()
        self.total = TOTAL

    async def processes(self) -> list[GpuProcess]:
        passed = asyncio.get_running_loop().time() - self.began
        return [GpuProcess(0, 7, self.held(passed)), GpuProcess(0, 8, TOTAL)]

    async def totals(self) -> dict[int, int]:
        return {0: self.total}

    async def used(self) -> dict[int, int]:
        return {0: (await self.processes())[0].used_bytes}


def after(secs: float, first: int, then: int) -> Callable[[float], int]:
    return lambda passed: first if passed < secs else then


@pytest.mark.parametrize(
    ("eviction", "held", "before", "released", "secs"),
    [
        (OFFLOAD, after(0, 0, 0), 40 * GIB, 0, 0.0),
        (STOP, after(1.0, GIB, 0), 40 * GIB, 0, 1.0),
        (OFFLOAD, after(0, 0, 20 * GIB), 40 * GIB, 20 * GIB, SETTLED_SECS),
        (OFFLOAD, after(0.4, 19 * GIB, 18 * GIB), 40 * GIB, 18 * GIB, 0.4 + SETTLED_SECS),
        (OFFLOAD, after(0, 0, 20 * GIB + 1), 40 * GIB, None, 3.0),
        (STOP, after(0, 0, 1), 40 * GIB, None, 3.0),
    ],
)
@in_virtual_time
async def test_memory_is_released_when_it_is_gone_or_half_of_it_for_good(
    eviction: Eviction, held: Callable[[float], int], before: int, released: int | None, secs: float
) -> None:
    loop = asyncio.get_running_loop()
    config = replace(CONFIG, gpu_memory=0.9)
    effect = RunPlan("a", 1, park_plan(config, eviction), config, (0,))
    device: Any = Device(held)
    began = loop.time()
    if released is None:
        with pytest.raises(MemoryNotReleased, match=r"still held after 3 s"):
            await verify_release(device, effect, {7: before}, 3.0)
    else:
        assert await verify_release(device, effect, {7: before}, 3.0) == released
    assert loop.time() - began >= secs, "virtual seconds"
    assert await verify_release(device, effect, {}, 3.0) == 0
    device.available = False
    assert await verify_release(device, effect, {7: before}, 3.0) == 0


# ---- room ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "held", "gpus", "warned"),
    [
        (after(0, 0, 50 * GIB), 0, (0,), 0),
        (after(0, 0, 50 * GIB + 1), 0, (0,), 1),
        (after(0, 0, 60 * GIB), 10 * GIB, (0,), 0),
        (after(0, 0, 60 * GIB + 1), 10 * GIB, (0,), 1),
        (after(0, 0, 55 * GIB), 10 * GIB, (0, 5), 0),
        (after(0, 0, 55 * GIB + 1), 10 * GIB, (0, 5), 1),
        (after(ROOM_SECS / 2, TOTAL, 0), 0, (0,), 0),
        (after(1000.0, TOTAL, 0), 0, (0,), 1),
        (after(0, 0, TOTAL), 0, (), 0),
    ],
)
@in_virtual_time
async def test_room_is_what_is_free_beside_what_the_engine_has(
    used: Callable[[float], int], held: int, gpus: tuple[int, ...], warned: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        said: list[str] = []
        monkeypatch.setattr(module.log, "warning", lambda text, *a, **_: said.append(text % a))
        device: Any = Device(used)
        await wait_for_room(device, replace(EFFECT, gpus=gpus), held=held)
        assert len(said) == warned
        device.available = False
        await wait_for_room(device, EFFECT)
        assert len(said) == warned


@in_loop
async def test_the_three_who_hold_most_are_named() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "ROOM_SECS", 0.0)
        held = [GpuProcess(0, pid, pid * GIB) for pid in (1, 4, 2, 3)]
        bench = bench_of(*held, GpuProcess(1, 9, 50 * GIB), GpuProcess(0, 5, 0))
        bench.answers |= {"gpu.totals": {0: TOTAL}, "gpu.used": {0: TOTAL - 2 * GIB}}
        with pytest.raises(CheckpointFailed) as failed:
            await require_room(bench.drivers.gpu, EFFECT, 3 * GIB, 9.0)
        assert failed.value.blame is Blame.HOST
        assert (
            "GPU 0 has 2.0 GiB free, and a will ask for 3.0 GiB: process 4 holds 4.0 GiB,"
            " process 3 holds 3.0 GiB, process 2 holds 2.0 GiB"
        ) in str(failed.value)
        bench.answers |= {"gpu.processes": [], "gpu.used": {}}
        await require_room(bench.drivers.gpu, EFFECT, TOTAL, 9.0)
        bench.answers["gpu.used"] = {0: 1}
        with pytest.raises(CheckpointFailed, match="no process is seen to hold it"):
            await require_room(bench.drivers.gpu, EFFECT, TOTAL, 9.0)
        two = replace(EFFECT, gpus=(0, 7))
        await require_room(bench.drivers.gpu, two, 2 * (TOTAL - 1), 9.0)
        bench.answers["gpu.used"] = NO
        await require_room(bench.drivers.gpu, EFFECT, TOTAL, 9.0)
        await wait_for_room(bench.drivers.gpu, EFFECT)


@pytest.mark.parametrize(("deadline", "waited"), [(4.0, 2.0), (100.0, ROOM_SECS)])
@in_virtual_time
async def test_room_for_a_resume_is_waited_for_half_its_time(
    deadline: float, waited: float
) -> None:
    loop = asyncio.get_running_loop()
    device: Any = Device(after(0, 0, TOTAL))
    began = loop.time()
    with pytest.raises(CheckpointFailed):
        await require_room(device, EFFECT, GIB, deadline)
    assert loop.time() - began >= waited, "virtual seconds"
    device.available = False
    await require_room(device, EFFECT, GIB, deadline)


@in_virtual_time
async def test_host_memory_of_a_parked_engine_is_seen_or_unknown() -> None:
    bench = Bench(units_memory_bytes=7)
    assert await host_bytes(bench.drivers, bench.instance) == 7
    bench.answers["units.memory_bytes"] = NO
    assert await host_bytes(bench.drivers, bench.instance) is None

    async def hang(_: object) -> int:
        await asyncio.Event().wait()
        return 1

    bench.drivers.units.memory_bytes = hang  # type: ignore[assignment,method-assign]
    assert await host_bytes(bench.drivers, bench.instance) is None
    bench.instance.handle = None
    assert await host_bytes(bench.drivers, bench.instance) is None
