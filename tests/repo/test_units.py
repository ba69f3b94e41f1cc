"""The unit files: what must be in them, what must never be, and what systemd says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmux.gateway import workers
from llmux.gateway.stopping import ABORT_SECS, DrainLimits

UNITS = Path(__file__).resolve().parents[2] / "units"
SYSTEM_UNITS = Path("/usr/lib/systemd/system")

# systemd 257, execute.c: exec_needs_mount_namespace(), and what its callers imply.
MAKES_A_MOUNT_NAMESPACE = {
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories",
    "ExtensionImages", "InaccessiblePaths", "LogNamespace", "MountAPIVFS", "MountFlags",
    "MountImages", "NoExecPaths", "PrivateDevices", "PrivateIPC", "PrivateMounts",
    "PrivateNetwork", "PrivatePIDs", "PrivateTmp", "PrivateUsers", "ProcSubset",
    "ProtectControlGroups", "ProtectHome", "ProtectKernelLogs", "ProtectKernelModules",
    "ProtectKernelTunables", "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths",
    "RootDirectory", "RootImage", "TemporaryFileSystem",
}  # fmt: skip
INSTALLS_A_SECCOMP_FILTER = {
    "LockPersonality", "MemoryDenyWriteExecute", "ProtectClock", "ProtectHostname",
    "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID",
    "SystemCallArchitectures", "SystemCallFilter", "SystemCallLog",
}  # fmt: skip
# Not known to systemd 252 (Debian 12), which would only warn, at every reload.
NEWER_THAN_252 = {
    "DelegateSubgroup", "FileDescriptorStorePreserve", "ImportCredential", "MemoryZSwapWriteback",
    "OpenFile", "RestartMaxDelaySec", "RestartMode", "RestartSteps", "SurviveFinalKillSignal",
}  # fmt: skip


def read_unit(name: str) -> list[tuple[str, str, str]]:
    """All (section, key, value) of a unit file, in order: a key may be given more than once."""
    settings = []
    section = ""
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and not line.startswith(("#", ";")):
            key, equals, value = line.partition("=")
            assert equals, f"{name}: {line!r} is no setting"
            settings.append((section, key, value))
    return settings


def values(name: str, key: str) -> list[str]:
    return [value for _, have, value in read_unit(name) if have == key]


def keys(name: str) -> set[str]:
    return {key for _, key, _ in read_unit(name)}


def test_supervisor_hands_down_no_mount_namespace_and_no_seccomp_filter() -> None:
    # Engines and CRIU are forked from it: see the end of the unit file.
    have = keys("llmux.service")
    assert not have & MAKES_A_MOUNT_NAMESPACE
    assert not have & INSTALLS_A_SECCOMP_FILTER


def test_supervisor_keeps_the_capabilities_that_criu_and_cuda_need() -> None:
    (dropped,) = values("llmux.service", "CapabilityBoundingSet")
    assert dropped.startswith("~")
    # criu(8), "Non-root", and loading nvidia-uvm on the first CUDA call.
    needed = (
        "CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER KILL MKNOD NET_ADMIN SETGID"
        " SETPCAP SETUID SYS_ADMIN SYS_CHROOT SYS_MODULE SYS_NICE SYS_PTRACE SYS_RESOURCE"
    )
    assert not {f"CAP_{name}" for name in needed.split()} & set(dropped[1:].split())


def test_a_stop_of_the_gateway_is_over_before_systemd_kills() -> None:
    (timeout,) = values("llmux-gateway.service", "TimeoutStopSec")
    worker = DrainLimits().secs + ABORT_SECS
    assert worker + 10 <= workers.STOP_SECS <= float(timeout) - 5
    text = (UNITS / "llmux-gateway.service").read_text()
    assert f"get {DrainLimits().secs:.0f} s" in text
    (watchdog,) = values("llmux-gateway.service", "WatchdogSec")
    assert float(watchdog) >= workers.BEAT_SECS * 5


@pytest.mark.parametrize("service", ["llmux.service", "llmux-gateway.service"])
def test_services_restart_without_end_but_not_on_a_bad_configuration(service: str) -> None:
    assert values(service, "Restart") == ["always"]
    assert values(service, "StartLimitIntervalSec") == ["0"]
    assert values(service, "RestartPreventExitStatus") == ["78"]
    assert values(service, "Type") == ["notify"]
    assert values(service, "WatchdogSec")


def test_only_the_gateway_keeps_descriptors() -> None:
    """Its listening sockets. The supervisor has none to keep: engines write into files."""
    assert int(values("llmux-gateway.service", "FileDescriptorStoreMax")[0]) > 0
    assert "FileDescriptorStoreMax" not in keys("llmux.service")


@pytest.mark.parametrize("service", ["llmux.service", "llmux-gateway.service"])
def test_neither_service_can_take_the_other_or_an_engine_down(service: str) -> None:
    assert not keys(service) & {
        "BindsTo", "Conflicts", "PartOf", "PropagatesStopTo", "Requires", "Requisite",
        "StopPropagatedFrom", "Upholds",
    }  # fmt: skip


def test_one_command_starts_both_and_one_stops_everything() -> None:
    assert values("llmux.service", "Wants") == ["llmux-gateway.service", "llmux-engines.target"]
    assert values("llmux.service", "WantedBy") == ["multi-user.target"]
    for service in ("llmux.service", "llmux-gateway.service"):
        assert values(service, "Slice") == ["llmux.slice"]


def test_state_is_roots_alone_and_nothing_is_removed_at_stop() -> None:
    assert values("llmux.service", "StateDirectoryMode") == ["0700"]
    # Engines that go on running have their sockets in /run/llmux: it is no RuntimeDirectory=.
    assert "RuntimeDirectory" not in keys("llmux.service")
    assert values("llmux-gateway.service", "RuntimeDirectory") == ["llmux-gateway"]
    assert "d /run/llmux 0751 root llmux -" in (UNITS / "llmux.tmpfiles").read_text()


def test_engine_user_is_no_member_of_the_control_group() -> None:
    sysusers = (UNITS / "llmux.sysusers").read_text()
    assert re.search(r"^u llmux-engine ", sysusers, re.M)
    assert not re.search(r"^m llmux-engine llmux$", sysusers, re.M)


@pytest.mark.parametrize("unit", sorted(p.name for p in UNITS.glob("*.s[el][ri]*")))
def test_units_use_what_systemd_252_knows(unit: str) -> None:
    assert not keys(unit) & NEWER_THAN_252
    assert "notify-reload" not in values(unit, "Type")


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[Path]:
    """A root with the units, the system's own next to them, and stand-ins for what they execute."""
    if shutil.which("systemd-analyze") is None or not SYSTEM_UNITS.is_dir():
        pytest.skip("systemd-analyze is not installed")
    directory = tmp_path / "usr/lib/systemd/system"
    directory.mkdir(parents=True)
    for unit in (*SYSTEM_UNITS.glob("*.target"), *SYSTEM_UNITS.glob("*.slice")):
        shutil.copyfile(unit, directory / unit.name)
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.slice")):
        shutil.copy(unit, directory)
    for program in ("usr/bin/llmux", "bin/kill"):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    yield tmp_path


def test_systemd_finds_nothing_to_complain_about(staged: Path) -> None:
    units = sorted(path.name for path in (*UNITS.glob("*.service"), *UNITS.glob("*.slice")))
    assert len(units) == 3
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={staged}", *units],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "llmux" in line]
    assert not complaints
    assert done.returncode == 0, done.stderr


def test_systemd_would_complain_about_a_typing_mistake(staged: Path) -> None:
    # Shows that the check above sees something at all.
    unit = staged / "usr/lib/systemd/system/llmux.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSecs="))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={staged}", "llmux.service"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert "WatchdogSecs" in done.stderr


@pytest.mark.parametrize(
    ("unit", "threshold"),
    [
        ("llmux-gateway.service", 15),  # 1.2 with systemd 252 and 257
        ("llmux.service", 94),  # root, forks engines, runs CRIU: 9.3; container managers score 9.6
    ],
)
def test_exposure_does_not_grow(staged: Path, unit: str, threshold: int) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager",
         f"--threshold={threshold}", f"--root={staged}", unit],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-500:]
