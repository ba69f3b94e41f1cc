"""GPUs and the state file where they are rarely so: odd ledgers, a library's words, bounds."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers import gpu
from llmux.drivers.gpu import LedgerObserver, NoGpu, NvmlObserver, find_gpu_observer, nvml_is_here
from llmux.drivers.processes.process import start_ticks
from llmux.drivers.store import FileStateStore
from llmux.errors import DriverError, DriverTimeout, StateFileError, Unsupported
from llmux.ports import GpuProcess

OWN = os.getpid()


class Nvml:
    """One GPU; each call answers 0 but for those that a test replaces."""

    def __init__(self, **calls: Callable[..., int]) -> None:
        self.called: list[str] = []
        self._calls = calls
        self.nvmlErrorString = ErrorString()

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*args: Any) -> int:
            self.called.append(name)
            if name == "nvmlDeviceGetCount_v2":
                args[0]._obj.value = 1
            return self._calls[name](*args) if name in self._calls else 0

        return call


class ErrorString:
    restype: object = ctypes.c_int

    def __call__(self, code: Any) -> bytes:
        return b"trouble"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Nvml], list[Any]]:
    """Puts a library in the place of all; what is loaded is listed."""

    def put(nvml: Nvml) -> list[Any]:
        names: list[Any] = []

        def load(name: Any) -> Nvml:
            names.append(name)
            return nvml

        monkeypatch.setattr(ctypes, "CDLL", load)
        return names

    return put


def closed(observer: Any) -> None:
    asyncio.run(observer.close())
    if isinstance(observer, NvmlObserver):
        observer._caller.end()


def test_nvidias_library_is_looked_for_by_its_name_or_the_given_one(
    loaded: Callable[[Nvml], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMUX_GPU_LEDGER", raising=False)
    monkeypatch.delenv("LLMUX_LIBNVML", raising=False)
    names = loaded(Nvml())
    closed(find_gpu_observer())
    assert nvml_is_here() is True
    closed(NvmlObserver())
    monkeypatch.setenv("LLMUX_LIBNVML", "other")
    closed(find_gpu_observer())
    assert names == ["libnvidia-ml.so.1"] * 3 + ["other"]
    loaded(Nvml(nvmlInit_v2=lambda: 9))
    assert nvml_is_here() is False
    assert isinstance(find_gpu_observer(), NoGpu)


def test_the_words_of_the_library_are_read_as_words(
    loaded: Callable[[Nvml], list[Any]],
) -> None:
    nvml = Nvml(nvmlInit_v2=lambda: 9)
    loaded(nvml)
    with pytest.raises(Unsupported, match="nvmlInit: trouble"):
        NvmlObserver("x")
    assert nvml.nvmlErrorString.restype is ctypes.c_char_p, "an int would cut its address"


def test_a_look_has_the_time_that_is_given(loaded: Callable[[Nvml], list[Any]]) -> None:
    free = threading.Event()
    nvml = Nvml()
    loaded(nvml)
    observer = NvmlObserver("x", call_secs=0.01)

    def hang(*_: Any) -> int:
        free.wait()
        return 0

    nvml._calls["nvmlDeviceGetHandleByIndex_v2"] = hang

    async def body() -> None:
        with pytest.raises(DriverTimeout, match=r"no answer within 0\.01 s"):
            await observer.totals()
        assert "has not returned for 0 s" in (observer.blind or "")
        await observer.close()  # says nothing of it
        free.set()

    asyncio.run(body())
    assert "nvmlShutdown" not in nvml.called, "at once: it hangs already"
    observer._caller.end()


def test_what_waits_without_a_loop_has_the_answer() -> None:
    caller = gpu._Caller("the GPUs", 7.0)
    assert caller.wait(lambda: 7, 30) == 7
    with pytest.raises(ZeroDivisionError):
        caller.wait(lambda: 1 // 0, 30)
    assert caller.blind is None
    caller.end()


def ledger(path: Path, document: Mapping[str, Any]) -> LedgerObserver:
    path.write_text(json.dumps(document))
    return LedgerObserver(str(path))


def row(on: int, pid: int, start: int, used: int) -> dict[str, int]:
    return {"gpu": on, "pid": pid, "start": start, "bytes": used}


def test_a_start_may_be_off_by_one_tick(tmp_path: Path) -> None:
    """A restored engine's clock has an offset of its own, which is rounded."""
    ticks = start_ticks(OWN) or 0
    for off, counts in ((-2, False), (-1, True), (0, True), (1, True), (2, False)):
        found = ledger(tmp_path / "l", {"rows": [row(3, OWN, ticks + off, 5)]})
        assert asyncio.run(found.processes()) == ([GpuProcess(3, OWN, 5)] if counts else [])


def test_what_the_dead_hold_is_passed_over(tmp_path: Path) -> None:
    """Also of one that nobody has waited for yet; and a GPU that was not announced counts."""
    ticks = start_ticks(OWN) or 0
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        rows = [
            row(0, zombie.pid, start_ticks(zombie.pid) or 0, 1),
            row(0, 2**22 + 1, ticks, 2),
            row(1, OWN, ticks, 5),
            row(0, OWN, ticks, 6),
            row(1, OWN, ticks, 7),
        ]
        found = ledger(tmp_path / "l", {"gpus": {"0": {"capacity": 9}}, "rows": rows})
        assert asyncio.run(found.processes()) == [GpuProcess(0, OWN, 6), GpuProcess(1, OWN, 12)]
        assert asyncio.run(found.used()) == {0: 6, 1: 12}
        assert asyncio.run(found.totals()) == {0: 9}
    assert found.available is True
    assert found.blind is None


@pytest.mark.parametrize("text", ["", " \n", "{}", '{"gpus": {}}', '{"rows": []}'])
def test_a_ledger_without_some_of_it_is_empty_there(tmp_path: Path, text: str) -> None:
    (tmp_path / "l").write_text(text)
    found = LedgerObserver(str(tmp_path / "l"))
    assert asyncio.run(found.gpu_count()) == 0
    assert asyncio.run(found.processes()) == []
    assert asyncio.run(found.used()) == {}
    asyncio.run(found.close())


def test_a_ledger_that_is_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DriverError, match=r"cannot read the GPU ledger .*l: "):
        asyncio.run(LedgerObserver(str(tmp_path / "l")).processes())


# ---- the state file ------------------------------------------------------------------------------


def test_a_state_file_over_16_mib_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for size, words in ((16 << 20, "Expecting value"), ((16 << 20) + 1, "larger than 16777216")):
        path.touch()
        os.truncate(path, size)
        with pytest.raises(StateFileError, match=f"{words}.*it is kept as") as raised:
            FileStateStore(str(path)).load()
        assert "it is only a hint" in (raised.value.hint or "")
        assert not path.exists()


def test_what_cannot_be_put_aside_is_said_too(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("{")
    (tmp_path / "state.damaged").mkdir()
    with pytest.raises(StateFileError, match=r"cannot be put aside as .*state\.damaged: Is a dir"):
        FileStateStore(str(path)).load()
    with pytest.raises(StateFileError, match="cannot write the state file"):
        FileStateStore(str(tmp_path / "none" / "state")).save({})
