"""What NVML says, call by call, by a library of ours: old drivers, odd answers, one that hangs."""

from __future__ import annotations

import asyncio
import ctypes
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers import gpu
from llmux.drivers.gpu import LedgerObserver, NoGpu, NvmlObserver, find_gpu_observer
from llmux.errors import DriverError, DriverTimeout, Unsupported
from llmux.ports import GpuProcess

UNKNOWN = 2**64 - 1


class Nvml:
    """Two GPUs; ``rows`` of each: (pid, bytes). What is in ``lacks`` an old driver has not."""

    def __init__(self, lacks: tuple[str, ...] = (), codes: dict[str, int] | None = None) -> None:
        self.lacks = lacks
        self.codes = codes or {}
        self.rows: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
        self.mig: dict[int, int] = {}
        self.asked: list[int] = []
        self.calls: list[str] = []
        self.nvmlErrorString = ErrorString()

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name in self.lacks or f"do_{name}" not in dir(type(self)):
            raise AttributeError(name)
        call = getattr(self, f"do_{name}")

        def answer(*args: Any) -> int:
            self.calls.append(name)
            return self.codes.get(name) or call(*args) or 0

        return answer

    def do_nvmlInit_v2(self) -> None: ...  # noqa: N802

    def do_nvmlShutdown(self) -> None: ...  # noqa: N802

    def do_nvmlDeviceGetCount_v2(self, count: Any) -> None:  # noqa: N802
        count._obj.value = 2

    def do_nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> None:  # noqa: N802
        device._obj.value = index.value + 100

    def do_nvmlDeviceGetMigMode(self, device: Any, now: Any, later: Any) -> None:  # noqa: N802
        now._obj.value = self.mig.get(device.value - 100, 0)
        later._obj.value = 1

    def do_nvmlDeviceGetMemoryInfo_v2(self, device: Any, memory: Any) -> int:  # noqa: N802
        assert memory._obj.version == ctypes.sizeof(memory._obj) | 2 << 24
        memory._obj.total, memory._obj.reserved = 1000 * (device.value - 99), 100
        memory._obj.used = 70
        return 0

    def do_nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> None:  # noqa: N802
        memory._obj.total, memory._obj.used = 1000 * (device.value - 99), 170

    def do_nvmlDeviceGetComputeRunningProcesses_v3(  # noqa: N802
        self, device: Any, count: Any, table: Any
    ) -> int:
        rows = self.rows[device.value - 100]
        room = count._obj.value
        self.asked.append(room)
        count._obj.value = len(rows)
        if len(rows) > room:
            return 7
        for place, (pid, used) in enumerate(rows):
            table[place].pid, table[place].used = pid, used
        return 0

    do_nvmlDeviceGetComputeRunningProcesses_v2 = (  # noqa: N815
        do_nvmlDeviceGetComputeRunningProcesses_v3
    )


class ErrorString:
    restype: object = None

    def __call__(self, code: Any) -> bytes | None:
        return b"trouble" if code.value == 9 else None


def observe(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> NvmlObserver:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    return NvmlObserver("libx")


async def close(observer: NvmlObserver) -> None:
    await observer.close()
    observer._caller.end()


def test_memory_and_processes_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    nvml.rows = {0: [(7, 10), (8, 20)], 1: [(7, 30)]}
    observer = observe(monkeypatch, nvml)

    async def body() -> None:
        assert observer.available and observer.blind is None
        assert await observer.gpu_count() == 2
        assert await observer.totals() == {0: 900, 1: 1900}
        assert await observer.used() == {0: 70, 1: 70}
        assert await observer.processes() == [
            GpuProcess(0, 7, 10), GpuProcess(0, 8, 20), GpuProcess(1, 7, 30),
        ]  # fmt: skip
        assert nvml.asked == [64, 64]
        nvml.rows = {0: [(pid, 1) for pid in range(64)], 1: [(pid, 1) for pid in range(65)]}
        assert len(await observer.processes()) == 129
        assert nvml.asked[2:] == [64, 64, 130], "asked again where there are more"
        await close(observer)
        assert nvml.calls[-1] == "nvmlShutdown"

    asyncio.run(body())


def test_what_is_not_known_of_each_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    observer = observe(monkeypatch, nvml)

    async def body() -> None:
        for rows, expected in (
            ([(7, UNKNOWN), (8, 10), (9, UNKNOWN)], [30, 10, 30]),
            ([(7, UNKNOWN)], [70]),
            ([(7, UNKNOWN), (8, 90)], [0, 90]),
        ):
            nvml.rows = {0: rows, 1: []}
            assert [one.used_bytes for one in await observer.processes()] == expected
        await close(observer)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("lacks", "codes"),
    [
        (("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetComputeRunningProcesses_v3",
          "nvmlDeviceGetMigMode"), {}),
        ((), {"nvmlDeviceGetMemoryInfo_v2": 9, "nvmlDeviceGetMigMode": 9}),
    ],
)  # fmt: skip
def test_an_old_driver_is_asked_by_its_own_calls(
    monkeypatch: pytest.MonkeyPatch, lacks: tuple[str, ...], codes: dict[str, int]
) -> None:
    nvml = Nvml(lacks, codes)
    nvml.rows = {0: [(7, 10)], 1: []}
    observer = observe(monkeypatch, nvml)

    async def body() -> None:
        assert await observer.totals() == {0: 1000, 1: 2000}
        assert await observer.used() == {0: 170, 1: 170}
        assert await observer.processes() == [GpuProcess(0, 7, 10)]
        await close(observer)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("nvmlInit_v2", "nvmlInit"),
        ("nvmlDeviceGetCount_v2", "nvmlDeviceGetCount"),
        ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex(0)"),
        ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses"),
    ],
)
@pytest.mark.parametrize(("code", "words"), [(9, "trouble"), (8, "?")])
def test_a_call_that_fails_is_named_with_its_words(
    monkeypatch: pytest.MonkeyPatch, call: str, named: str, code: int, words: str
) -> None:
    nvml = Nvml(("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMigMode"))
    if call == "nvmlInit_v2":
        nvml.codes[call] = code
        before = threading.active_count()
        with pytest.raises(Unsupported, match="nvmlInit: ") as raised:
            observe(monkeypatch, nvml)
        assert threading.active_count() <= before + 1
    else:
        observer = observe(monkeypatch, nvml) if call != "nvmlDeviceGetCount_v2" else None
        if observer is None:
            nvml.codes[call] = code
            with pytest.raises(Unsupported) as raised:
                observe(monkeypatch, nvml)
        else:
            nvml.codes[call] = code

            async def body() -> None:
                look = observer.processes if "Processes" in call else observer.used
                try:
                    await look()
                finally:
                    await close(observer)

            with pytest.raises(Unsupported) as raised:
                asyncio.run(body())
    assert str(raised.value).startswith(f"cannot observe the GPUs: {named}: {words}")
    assert "nvidia-smi" in (raised.value.hint or "")


def test_a_divided_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = Nvml()
    nvml.mig = {1: 1, 0: 2}
    observer = observe(monkeypatch, nvml)
    assert "GPU 1 is divided by MIG" in caplog.text
    assert "GPU 0" not in caplog.text
    asyncio.run(close(observer))
    caplog.clear()
    for old in (Nvml(("nvmlDeviceGetMigMode",)), Nvml(codes={"nvmlDeviceGetMigMode": 3})):
        old.mig = {0: 1}
        asyncio.run(close(observe(monkeypatch, old)))
    assert caplog.text == ""


def test_a_library_of_that_name_that_is_not_nvidias_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Unsupported, match="libx: nvmlInit_v2"):
        observe(monkeypatch, Nvml(("nvmlInit_v2",)))
    assert "hangs" not in caplog.text
    monkeypatch.undo()
    with pytest.raises(Unsupported, match="libnothing"):
        NvmlObserver("libnothing.so.9")


def test_a_start_that_hangs_makes_the_observer_blind_until_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "START_SECS", 0.01)
    free = threading.Event()

    class Slow(Nvml):
        def do_nvmlInit_v2(self) -> None:  # noqa: N802
            free.wait()

    observer = observe(monkeypatch, Slow())
    assert "has not returned" in (observer.blind or "")
    stuck = [thread for thread in threading.enumerate() if thread.name == "llmux-nvml"]
    assert all(thread.daemon for thread in stuck) and stuck, "no process waits for it at its end"

    async def body() -> None:
        with pytest.raises(DriverError, match=r"a call has not returned for \d+ s") as raised:
            await observer.gpu_count()
        assert "nvidia-smi" in (raised.value.hint or "")
        free.set()
        while observer.blind is not None:  # noqa: ASYNC110  # the thread says nothing
            await asyncio.sleep(0)
        assert await observer.gpu_count() == 2
        free.clear()
        with pytest.raises(DriverTimeout, match=r"no answer within 0\.01 s"):
            await observer._caller.call(free.wait, 0.01)
        free.set()
        observer._caller.end()

    asyncio.run(body())


def test_a_host_without_gpus_knows_nothing() -> None:
    async def body() -> None:
        none = NoGpu()
        assert (none.available, none.blind, await none.gpu_count()) == (False, None, 0)
        assert (await none.processes(), await none.totals(), await none.used()) == ((), {}, {})
        await none.close()

    asyncio.run(body())


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_ledger_that_is_none_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "ledger"
    monkeypatch.setenv(gpu.LEDGER_VARIABLE, str(path))
    observer = find_gpu_observer()
    assert isinstance(observer, LedgerObserver)

    async def look() -> tuple[Any, ...]:
        return (await observer.gpu_count(), await observer.processes(), await observer.used())

    assert asyncio.run(look()) == (0, [], {})
    path.write_text(json.dumps({"gpus": {"0": {"capacity": 5}}, "rows": []}))
    assert asyncio.run(look()) == (1, [], {0: 0})
    path.write_text(text)
    with pytest.raises(DriverError, match="ledger"):
        asyncio.run(look())
    path.unlink()
    path.mkdir()
    with pytest.raises(DriverError, match=r"ledger .* Is a directory"):
        asyncio.run(look())
