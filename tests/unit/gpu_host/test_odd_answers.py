"""Programs that answer in another shape, checks that fail, and the throw-away process itself."""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.config.schema import Config, ModelConfig
from llmux.drivers.doctor import access, gpus, parking, subject
from llmux.drivers.doctor import run as checks
from llmux.drivers.doctor.facts import Check, Host, Level, Ran
from llmux.drivers.processes import process
from llmux.errors import LlmuxError
from llmux.ports import LaunchSpec

CONFIG = Config(models={"m": ModelConfig("m", "/m")})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not within 20 s"), ("\n \n", "not within 20 s"), ("x\nlast \n", "last"),
        ("5", "5"), ("[1, 2]", "[1, 2]"), ("null", "null"), ("y" * 300, "y" * 200),
    ],
)  # fmt: skip
def test_an_nvml_that_answers_otherwise_is_a_problem(text: str, problem: str) -> None:
    look = gpus.look_at(Host(run=lambda argv, seconds: Ran(0, text)))
    assert (look.problem, look.available, look.rows) == (problem, False, ())
    good = json.dumps([{"1": 5}, {"1": 3}, [[1, 7, 3]], True, 0.5])
    look = gpus.look_at(Host(run=lambda argv, seconds: Ran(0, f"{good}\nnoise")))
    assert look == gpus.Look({1: 5}, {1: 3}, [(1, 7, 3)], True, "", 0.5)


@pytest.mark.parametrize("text", ["", "x", "\n"])
def test_a_helper_that_answers_otherwise_has_failed(text: str) -> None:
    check = parking.check_libcuda(Host(run=lambda argv, seconds: Ran(0, text)), None)
    assert check.level is Level.WARN
    assert check.seen == f"the CUDA helper failed: {text.strip() or 'no answer within 60 s'}"
    good = json.dumps({"driver_version": 12050, "missing": [], "problem": None, "code": 0})
    check = parking.check_libcuda(Host(run=lambda argv, seconds: Ran(0, good)), None)
    assert check.seen == "libcuda.so.1, CUDA 12.5, all checkpoint functions"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no answer"), ("first\nlast", "last"), ("{}", "{}"), ("[]", "[]"), ("5", "5"),
        ("null", "null"), ('"x"', '"x"'),
    ],
)  # fmt: skip
def test_a_look_that_answers_otherwise_is_no_look(tmp_path: Path, text: str, words: str) -> None:
    spec = LaunchSpec("m", ("/v/vllm",), {"HOME": "/h"}, None, "", "", "/r")
    host = Host(
        root=tmp_path, euid=0, which=lambda name: name, starts=lambda config: [spec],
        as_engine=lambda spec, seconds: Ran(0, text),
    )  # fmt: skip
    found = access.check_access(host, CONFIG)
    assert found[0].seen == f"could not be looked at as root: {words}"
    assert found[0].level is Level.WARN


@pytest.mark.parametrize("error", [OSError("x"), ValueError("x"), LlmuxError("x"), KeyError("x")])
def test_a_check_that_fails_is_a_warning_of_its_own(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    good = Check("good", Level.OK, "fine")

    def fails(host: Host, config: Config | None) -> Check:
        raise error

    told: list[str] = []
    table = (("bad", fails), ("one", lambda *_: good), ("two", lambda *_: [good, good]))
    monkeypatch.setattr(checks, "CHECKS", table)
    monkeypatch.setattr(checks, "DEEP_CHECKS", (("deep", lambda *_: good),))
    monkeypatch.setattr(checks, "CUDA_CHECKS", (("cuda", lambda *_: good),))
    host = Host(tell=told.append)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            checks.run_checks(None, host)
        return
    found = checks.run_checks(None, host)
    assert found[0].seen == "could not be checked: x"
    assert (found[0].name, found[0].level) == ("bad", Level.WARN)
    assert found[1:] == [good] * 3
    assert told == ["looking at bad", "looking at one", "looking at two"]
    assert len(checks.run_checks(None, host, deep=True)) == 5
    assert told[-1] == "looking at deep"
    assert len(checks.run_checks(None, host, cuda_round_trip=True)) == 5
    assert told[-1] == "looking at cuda"


def test_controllers_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    top = tmp_path / "sys/fs/cgroup"
    (top / "cgroup.controllers").mkdir(parents=True)
    (top / "a.slice").mkdir()
    for name in ("cgroup.freeze", "cgroup.kill"):
        check = checks.check_cgroup(Host(root=tmp_path), None)
        assert (check.level, check.seen) == (Level.FAIL, f"no {name}")
        (top / name).touch()  # the root's own say nothing about those below
        (top / "a.slice" / name).touch()
    check = checks.check_cgroup(Host(root=tmp_path), None)
    assert check.level is Level.WARN
    assert check.seen == "no memory controller (none): MemoryMax has no effect"


@pytest.mark.parametrize("text", [b"", b"7 (a) S", b"7 (a) S 1 2 3 4 5 6 7 8 9 10 x y"])
def test_a_line_of_proc_that_is_cut_counts_nothing(
    monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    def opened(path: str, mode: str = "r") -> io.IOBase:
        return io.BytesIO(text) if "b" in mode else io.StringIO("RssAnon:\nRssShmem:\tx kB\n")

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", opened)
        found = process.cpu_seconds([7, 8]), process.memory_bytes([7, 8])
    assert found == (0.0, 0)


# ---- the throw-away process ----------------------------------------------------------------------


class Cuda:
    """A libcuda of one GPU whose memory is a buffer; ``codes``: what fails."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.calls: list[str] = []
        self.memory = b""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.calls.append(name)
            if name == "cuGetErrorString":
                args[1]._obj.value = b"words" if args[0] == 9 else None
            elif name == "cuMemcpyHtoD_v2":
                self.memory = args[1]
            elif name == "cuMemcpyDtoH_v2":
                ctypes.memmove(args[0], self.memory, len(self.memory))
            return self.codes.get(name, 0)

        return call


def test_known_bytes_come_back_or_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda library: cuda)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, signals: None)
    said: list[str] = []
    orders: list[int | None] = []

    def wait(signals: set[int], seconds: float) -> object:
        assert (signals, seconds) == ({signal.SIGUSR1, signal.SIGTERM}, subject.LIFE_SECS)
        said.extend(f"{path.name}: {path.read_text()}" for path in sorted(tmp_path.iterdir()))
        for path in tmp_path.iterdir():
            path.unlink()
        number = orders.pop(0)
        if number == 0:
            cuda.memory = bytes(1000)
            number = signal.SIGUSR1
        elif number == 1:
            cuda.codes["cuMemcpyDtoH_v2"] = 9
            number = signal.SIGUSR1
        return None if number is None else SimpleNamespace(si_signo=number)

    monkeypatch.setattr(signal, "sigtimedwait", wait)
    orders[:] = [signal.SIGUSR1, 0, 1, signal.SIGTERM]
    subject.main("lib", str(tmp_path), 1000)
    assert said == ["ready: ", "equal: ", "differ: ", "differ: cuMemcpyDtoH_v2: words (9)"]
    assert len(set(cuda.memory)) == 1
    assert cuda.calls[:6] == [
        "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAlloc_v2",
        "cuMemcpyHtoD_v2",
    ]  # fmt: skip
    assert cuda.calls[-2:] == ["cuMemFree_v2", "cuDevicePrimaryCtxRelease_v2"]
    said.clear()
    orders[:] = [None]  # nobody asks any more
    cuda.codes.clear()
    subject.main("lib", str(tmp_path), 10)
    assert said == ["ready: "]


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [("cuInit", 9, "cuInit: words (9)"), ("cuMemAlloc_v2", 2, "cuMemAlloc_v2: unknown error (2)"),
     (None, 0, "no such library")],
)  # fmt: skip
def test_a_start_that_fails_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str | None, code: int, text: str
) -> None:
    cuda = Cuda()

    def load(library: str) -> Cuda:
        if call is None:
            raise OSError(text)
        cuda.codes[call] = code
        return cuda

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, signals: None)
    subject.main("lib", str(tmp_path), 10)
    (path,) = tmp_path.iterdir()
    assert (path.name, path.read_text()) == ("failed", text)


def test_a_subject_of_its_own_process_answers_by_files(tmp_path: Path) -> None:
    source = Path(subject.__file__).read_text()
    argv = [sys.executable, "-I", "-c", source, f"{tmp_path}/libnone.so", str(tmp_path), "10"]
    assert subprocess.run(argv, check=False, timeout=60).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["failed"]
    assert f"{tmp_path}/libnone.so" in (tmp_path / "failed").read_text()
