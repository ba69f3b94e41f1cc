"""The doctor's look at GPU memory, on a made-up host and through the real calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llmux.config.schema import Config, ModelConfig
from llmux.drivers.doctor import gpus
from llmux.drivers.doctor.facts import GIB, Host, Level, Ran

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_nvml"))
sys.path.insert(0, str(Path(__file__).parents[1] / "standin"))

from fake_nvml import FakeNvml
from ledger import Ledger


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    ledger = Ledger(str(tmp_path / "ledger.json"), default_capacity_gib=80)
    ledger.init(gpus=1)
    fake = FakeNvml(tmp_path / "nvml", ledger.path)
    monkeypatch.setenv("LLMUX_LIBNVML", str(fake.library))
    yield fake
    fake.heal()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    for pid, cgroup in {7: "/llmux.slice/llmux-a.scope/engine", 8: "/user.slice"}.items():
        directory = tmp_path / "proc" / str(pid)
        directory.mkdir(parents=True)
        (directory / "cgroup").write_text(f"0::{cgroup}\n")
        (directory / "comm").write_text("python3\n")
    return Host(root=tmp_path)


def test_engines_of_llmux_are_no_foreigners(host: Host, nvml: FakeNvml) -> None:
    nvml.foreign((0, 7, 60 * GIB))
    check = gpus.check_memory(host, None)
    assert (check.level, check.seen) == (Level.OK, "GPU 0: 60.0 of 80.0 GiB in use")


def test_a_foreign_process_is_named(host: Host, nvml: FakeNvml) -> None:
    nvml.foreign((0, 7, 20 * GIB), (0, 8, 30 * GIB))
    check = gpus.check_memory(host, None)
    assert check.level is Level.WARN
    assert check.seen.endswith("process 8 (python3) holds 30.0 GiB of GPU 0")


def test_a_claim_that_others_leave_no_room_for_is_named(host: Host, nvml: FakeNvml) -> None:
    nvml.foreign((0, 8, 10 * GIB), (0, 7, 60 * GIB))
    models = {
        "big": ModelConfig("big", "/b", gpu_memory=0.9),
        "small": ModelConfig("small", "/s", gpu_memory=0.8),
    }
    check = gpus.check_memory(host, Config(models=models))
    assert check.level is Level.WARN
    assert check.seen.endswith("; big claims 72.0 GiB of GPU 0, and others leave 70.0")


def test_a_slow_nvml_is_said(host: Host) -> None:
    said = json.dumps([{"0": 80 * GIB}, {"0": 0}, [], True, 2.5])
    slow = replace(host, run=lambda argv, seconds: Ran(0, said))
    check = gpus.check_memory(slow, None)
    assert (check.level, "NVML took 2.5 s" in check.seen) == (Level.WARN, True)
    assert "waits 5 s" in check.remedy


def test_a_driver_that_hangs_is_left_behind(
    host: Host, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.fault("processes", "hang")
    monkeypatch.setattr(gpus, "LOOK_SECS", 2.0)
    check = gpus.check_memory(host, None)
    assert check.level is Level.WARN
    assert "NVML does not answer" in check.seen


def test_without_nvml_nothing_is_said_to_be_wrong(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMUX_LIBNVML", "libnothing.so.1")
    assert gpus.check_memory(host, None).level is Level.OK
    host.path("/proc/driver/nvidia").mkdir(parents=True)
    host.path("/proc/driver/nvidia/version").write_text("NVRM")
    check = gpus.check_memory(Host(root=host.root), None)
    assert (check.level, "libnvidia-ml1" in check.remedy) == (Level.WARN, True)


def test_what_cannot_be_read_is_shown(host: Host) -> None:
    def fails(argv: Sequence[str], seconds: float) -> Ran:
        return Ran(1, "Traceback\nDriverError: cannot observe the GPUs: GPU is lost")

    check = gpus.check_memory(replace(host, run=fails), None)
    assert check.seen == "NVML does not answer: DriverError: cannot observe the GPUs: GPU is lost"
