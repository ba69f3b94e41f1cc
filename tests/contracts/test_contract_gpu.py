"""What every observer of GPU memory must see: the ledger's, and NVML's real calls."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from llmux.drivers.gpu import LIBRARY_VARIABLE, LedgerObserver, NvmlObserver, find_gpu_observer
from llmux.errors import DriverError, DriverTimeout, Unsupported
from llmux.ports import GpuProcess

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_nvml"))
sys.path.insert(0, str(Path(__file__).parents[1] / "standin"))

from fake_nvml import FakeNvml
from ledger import GIB, Ledger, find_start_time

Observer = LedgerObserver | NvmlObserver
Holder = Callable[..., int]
T = TypeVar("T")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(str(tmp_path / "ledger.json"), default_capacity_gib=80)
    ledger.init(gpus=2)
    return ledger


@pytest.fixture
def nvml(tmp_path: Path, ledger: Ledger) -> Iterator[FakeNvml]:
    fake = FakeNvml(tmp_path / "nvml", ledger.path)
    yield fake
    fake.heal()


@pytest.fixture
def observer(request: pytest.FixtureRequest) -> Observer:
    """Of the kind that the test's parameter names."""
    ledger: Ledger = request.getfixturevalue("ledger")
    if request.param == "ledger":
        return LedgerObserver(ledger.path)
    nvml: FakeNvml = request.getfixturevalue("nvml")
    return NvmlObserver(str(nvml.library))


BOTH = pytest.mark.parametrize("observer", ["ledger", "nvml"], indirect=True)
NVML = pytest.mark.parametrize("observer", ["nvml"], indirect=True)


@pytest.fixture
def hold(ledger: Ledger) -> Iterator[Holder]:
    """Start a process that holds memory; returns its pid."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(gpu: int, **kinds: int) -> int:
        child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
        children.append(child)
        ledger.allocate(gpu, child.pid, find_start_time(child.pid) or 0, "a", kinds)
        return child.pid

    yield begin
    for child in children:
        child.kill()
        child.wait()


def see(observer: Observer, look: Callable[[], Awaitable[T]]) -> T:
    async def body() -> T:
        try:
            return await look()
        finally:
            await observer.close()

    return asyncio.run(body())


@BOTH
def test_processes_and_devices(observer: Observer, hold: Holder) -> None:
    first, second = hold(0, weights=7 * GIB, kv=3 * GIB), hold(1, context=1 * GIB)

    async def look() -> None:
        assert observer.available
        assert await observer.gpu_count() == 2
        assert sorted(await observer.processes(), key=lambda p: p.gpu) == [
            GpuProcess(0, first, 10 * GIB),
            GpuProcess(1, second, 1 * GIB),
        ]
        assert dict(await observer.totals()) == {0: 80 * GIB, 1: 80 * GIB}
        assert dict(await observer.used()) == {0: 10 * GIB, 1: 1 * GIB}

    see(observer, look)


@BOTH
@pytest.mark.parametrize(("ticks", "seen"), [(-2, 0), (-1, 1), (1, 1), (2, 0)])
def test_a_start_time_may_differ_by_the_tick_that_a_time_namespace_rounds(
    observer: Observer, hold: Holder, ledger: Ledger, ticks: int, seen: int
) -> None:
    pid = hold(0, weights=7 * GIB)
    start = find_start_time(pid)
    assert start is not None
    text = Path(ledger.path).read_text()
    Path(ledger.path).write_text(text.replace(f'"start": {start}', f'"start": {start + ticks}'))
    assert len(see(observer, observer.processes)) == seen


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@BOTH
def test_what_has_ended_holds_nothing(observer: Observer, hold: Holder) -> None:
    pid = hold(0, weights=7 * GIB)

    async def look() -> None:
        assert len(await observer.processes()) == 1
        await asyncio.to_thread(_end, pid)
        assert await observer.processes() == []
        assert (await observer.used())[0] == 0

    see(observer, look)


@pytest.mark.parametrize(
    ("defines", "total", "used"),
    [((), 80 * GIB, 7 * GIB), (("BEFORE_510",), 81 * GIB, 8 * GIB)],
    ids=["with the second version of the call", "before driver 510"],
)
def test_what_the_driver_keeps_for_itself_is_neither_room_nor_used(
    tmp_path: Path,
    ledger: Ledger,
    hold: Holder,
    defines: tuple[str, ...],
    total: int,
    used: int,
) -> None:
    """Before, an idle H200 had 0.6 GiB in use; vLLM takes its share of what is left."""
    fake = FakeNvml(tmp_path / "nvml", ledger.path, *defines)
    fake.reserve(GIB)
    hold(0, weights=7 * GIB)
    observer = NvmlObserver(str(fake.library))

    async def look() -> None:
        assert (await observer.totals())[0] == total
        assert (await observer.used())[0] == used

    see(observer, look)


@NVML
def test_more_processes_than_there_was_room_for(observer: Observer, nvml: FakeNvml) -> None:
    nvml.foreign(*((0, 1_000_000 + n, 1) for n in range(100)))
    assert len(see(observer, observer.processes)) == 100


@NVML
def test_an_unknown_amount_is_what_the_device_has_in_use_beyond_the_others(
    observer: Observer, nvml: FakeNvml, hold: Holder
) -> None:
    """Before, it was counted as nothing, and a release believed at once."""
    one, other = hold(0, weights=20 * GIB), hold(0, weights=4 * GIB)
    nvml.unknown([one])
    held = {p.pid: p.used_bytes for p in see(observer, observer.processes)}
    assert held == {one: 20 * GIB, other: 4 * GIB}


@NVML
def test_memory_that_comes_back_late_is_still_in_use(
    observer: Observer, nvml: FakeNvml, hold: Holder
) -> None:
    pid = hold(0, weights=7 * GIB)
    nvml.late(200)

    async def look() -> None:
        assert (await observer.used())[0] == 7 * GIB
        await asyncio.to_thread(_end, pid)
        began = time.monotonic()
        assert (await observer.used())[0] == 7 * GIB
        while (await observer.used())[0]:
            assert time.monotonic() < began + 20
        assert time.monotonic() >= began + 0.15

    see(observer, look)


@NVML
def test_a_lost_gpu_is_named(observer: Observer, nvml: FakeNvml) -> None:
    nvml.fault("processes", "fail 15")
    with pytest.raises(DriverError, match="GPU is lost"):
        see(observer, observer.processes)


def test_a_call_that_hangs_blinds_it_until_the_call_returns(
    nvml: FakeNvml,
) -> None:
    observer = NvmlObserver(str(nvml.library), call_secs=0.2)

    async def look() -> None:
        nvml.fault("processes", "hang")
        with pytest.raises(DriverTimeout, match="no answer within"):
            await observer.processes()
        assert observer.blind is not None
        with pytest.raises(DriverError, match="has not returned"):
            await observer.totals()
        nvml.heal()
        await asyncio.to_thread(_until_seeing, observer)
        assert await observer.processes() == []

    see(observer, look)


def _until_seeing(observer: Observer) -> None:
    while observer.blind is not None:
        os.sched_yield()


def test_a_driver_that_does_not_start_says_why(nvml: FakeNvml) -> None:
    nvml.fault("init", "fail 999")
    with pytest.raises(Unsupported, match="Unknown Error"):
        NvmlObserver(str(nvml.library))


def test_a_library_of_another_place_is_used(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(nvml.library))
    observer = find_gpu_observer()
    assert isinstance(observer, NvmlObserver)
    assert see(observer, observer.gpu_count) == 2
