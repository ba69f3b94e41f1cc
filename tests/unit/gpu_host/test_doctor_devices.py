"""The NVIDIA driver's device nodes, capabilities and huge pages, on a made-up host."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from llmux.config.schema import Config, Eviction, ModelConfig, Process
from llmux.drivers.doctor import run as host_checks
from llmux.drivers.doctor.facts import Check, Host, Level
from llmux.drivers.doctor.gpus import DEVICES, check_devices
from llmux.drivers.doctor.parking import check_capabilities

ALL = ("nvidiactl", "nvidia0", "nvidia1", "nvidia-uvm", "nvidia-uvm-tools")
CONFIG = Config(models={"m": ModelConfig("m", "/m")})


@pytest.fixture
def host(tmp_path: Path) -> Host:
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM")
    (tmp_path / "dev").mkdir()
    for name in ALL:
        (tmp_path / "dev" / name).touch()
        (tmp_path / "dev" / name).chmod(0o666)
    (tmp_path / "dev/nvidia-caps").mkdir()
    return Host(root=tmp_path, groups_of=lambda name: {44})


def look(host: Host, config: Config = CONFIG) -> Check:
    (check,) = check_devices(host, config)
    assert check.name == DEVICES
    assert check.level is Level.OK or check.remedy
    return check


def test_all_are_there_and_open(host: Host) -> None:
    check = look(host)
    assert (check.level, check.seen) == (Level.OK, "2 of GPUs, uvm and ctl, open to llmux-engine")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("nvidia-uvm", "nvidia-modprobe -u -c=0"),
        ("nvidia-uvm-tools", "nvidia-persistenced"),
        ("nvidiactl", "nvidia-smi"),
    ],
)
def test_one_that_is_missing_is_named(host: Host, name: str, remedy: str) -> None:
    host.path(f"/dev/{name}").unlink()
    check = look(host)
    assert (check.level, check.seen) == (Level.WARN, f"there is no /dev/{name}")
    assert remedy in check.remedy


def test_a_driver_without_any_gpu_is_said(host: Host) -> None:
    for name in ("nvidia0", "nvidia1"):
        host.path(f"/dev/{name}").unlink()
    assert look(host).seen == "there is no /dev/nvidia0"


def test_one_that_is_closed_to_engines_fails(host: Host) -> None:
    node = host.path("/dev/nvidia-uvm")
    node.chmod(0o660)
    check = look(host)
    assert check.level is Level.FAIL
    assert check.seen.startswith("llmux-engine may not open /dev/nvidia-uvm (mode 0660, group ")
    own_group = node.stat().st_gid
    assert look(replace(host, groups_of=lambda name: {own_group})).level is Level.OK
    assert look(host, replace(CONFIG, engine_user="root")).level is Level.OK
    node.chmod(0o644)
    assert look(host).level is Level.FAIL, "to read is not enough"


def test_without_a_driver_or_the_user_nothing_is_said(host: Host, tmp_path: Path) -> None:
    def nobody(name: str) -> set[int]:
        raise KeyError(name)

    host.path("/dev/nvidia-uvm").chmod(0o660)
    assert look(replace(host, groups_of=nobody)).level is Level.OK
    os.unlink(tmp_path / "proc/driver/nvidia/version")
    assert check_devices(host, CONFIG) == []


# ---- capabilities and huge pages -----------------------------------------------------------------

IMAGES = Config(models={"m": ModelConfig("m", "/m", eviction=Eviction(process=Process.CHECKPOINT))})


def capable(host: Host, bounding: int, config: Config) -> Check:
    status = host.path("/proc/self/status")
    status.parent.mkdir(exist_ok=True)
    status.write_text(f"Name:\tpython\nCapBnd:\t{bounding:016x}\nCapAmb:\t0\n")
    return check_capabilities(replace(host, euid=0), config)


def test_the_root_of_a_container_is_told_what_it_lacks(host: Host) -> None:
    whole = (1 << 41) - 1
    assert capable(host, whole, IMAGES).level is Level.OK
    less = whole & ~(1 << 24)
    check = capable(host, less, IMAGES)
    assert (check.level, "no SYS_RESOURCE: CRIU cannot" in check.seen) == (Level.FAIL, True)
    assert capable(host, less, replace(IMAGES, engine_user="root")).level is Level.WARN
    assert capable(host, less, CONFIG).level is Level.WARN
    check = capable(host, less & ~(1 << 21), replace(IMAGES, engine_user="root"))
    assert (check.level, "no SYS_ADMIN, no SYS_RESOURCE" in check.seen) == (Level.FAIL, True)
    assert check_capabilities(replace(host, euid=7), IMAGES).level is Level.WARN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("always [madvise] never\n", "madvise: restores fill pages of 4 KiB"),
        (
            "[always] madvise never\n",
            "always: restores fill huge pages",
        ),
        ("always madvise [never]\n", "never: restores fill pages of 4 KiB"),
        ("always madvise never [defer]\n", "defer: not known to llmux"),
        (None, "this kernel has none"),
    ],
)
def test_the_mode_of_huge_pages_is_said(host: Host, text: str | None, words: str) -> None:
    if text is not None:
        file = host.path("/sys/kernel/mm/transparent_hugepage/enabled")
        file.parent.mkdir(parents=True)
        file.write_text(text)
    check = host_checks.check_huge_pages(host, IMAGES)
    assert (check.level, check.seen.startswith(words)) == (Level.OK, True)
