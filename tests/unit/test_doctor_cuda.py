"""The doctor makes a context on each GPU, as an engine would."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llmux.config.schema import Config
from llmux.drivers.doctor import cuda
from llmux.drivers.doctor.facts import Check, Host, Level, Ran

COMPILER = shutil.which("cc")
SOURCE = Path(__file__).parents[1] / "fake_libcuda" / "devices.c"
Look = Callable[[int, int], Check]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """The check on a libcuda with so many GPUs, whose cuInit returns that code."""
    if COMPILER is None:
        pytest.skip("no C compiler for the fake libcuda.so.1")

    def check(gpus: int, fails: int) -> Check:
        library = tmp_path / "libcuda.so.1"
        flags = ["-shared", "-fPIC", f"-DGPUS={gpus}", f"-DFAILS={fails}"]
        subprocess.run([COMPILER, *flags, "-o", str(library), str(SOURCE)], check=True)
        monkeypatch.setenv("LLMUX_LIBCUDA", str(library))
        return cuda.check_cuda(Host(user_exists=lambda _: False), Config())

    return check


def test_a_context_on_each_gpu(look: Look) -> None:
    check = look(2, 0)
    assert check.level is Level.OK
    assert check.seen == (
        "a context on each, as we are: GPU 0: 2.0 of 8.0 GiB free, GPU 1: 2.0 of 8.0 GiB free"
    )


def test_what_the_driver_says_beside_it_is_no_answer() -> None:
    said = Ran(0, "[[1073741824, 2147483648]]\nWARNING: the driver is chatty\n")
    check = cuda.check_cuda(Host(run=lambda argv, seconds: said), Config())
    assert check.level is Level.OK
    assert check.seen.endswith("GPU 0: 1.0 of 2.0 GiB free")


def test_a_driver_that_an_engine_cannot_start_fails(look: Look) -> None:
    check = look(1, 100)
    assert check.level is Level.FAIL
    assert check.seen == "cuInit: no CUDA-capable device is detected (100)"
    assert "nvidia-modprobe -u -c=0" in check.remedy


def test_without_a_driver_nothing_is_said_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMUX_LIBCUDA", "libnothing.so.1")
    check = cuda.check_cuda(Host(), None)
    assert (check.level, check.seen) == (Level.OK, "no libnothing.so.1 here")


def test_the_driver_that_is_looked_for_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMUX_LIBCUDA", raising=False)
    scripts = []

    def run(argv: Sequence[str], _seconds: float) -> Ran:
        scripts.append(argv[-1])
        return Ran(0, "")

    cuda.check_cuda(Host(user_exists=lambda _: False, run=run), Config())
    assert ["libcuda.so.1" in script for script in scripts] == [True]
