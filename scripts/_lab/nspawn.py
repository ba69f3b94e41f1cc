"""How a guest is started and entered with systemd-nspawn: argument lists and nothing else."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence

from . import host

# What systemd-nspawn must be told by environment; each was found by a failure without it.
ENVIRONMENT = {
    # nspawn's own seccomp filter makes CRIU fail: "suspending seccomp failed".
    "SYSTEMD_SECCOMP": "0",
    # Guests always get cgroup2, on hosts with cgroup v1 too.
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # CRIU writes /proc/sys/kernel/ns_last_pid.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1",
    "PATH": host.SEARCH_PATH,
    "LC_ALL": "C.UTF-8",
}


def boot_argv(
    name: str, directory: pathlib.Path, bind_ro: Sequence[str], bind: Sequence[str]
) -> list[str]:
    return [
        "systemd-nspawn",
        f"--directory={directory}/root",
        "--boot",
        "--quiet",
        f"--machine={name}",
        f"--hostname={name}",
        # No systemd on the host to register with, and the cgroup is the guardian's.
        "--register=no",
        "--keep-unit",
        "--settings=no",
        # As on bare metal; CRIU needs most of them.
        "--capability=all",
        "--private-network",
        "--resolv-conf=off",
        "--timezone=off",
        "--link-journal=no",
        # READY=1 reaches the guardian when the guest's own systemd has finished booting.
        "--notify-ready=yes",
        *(f"--bind-ro={spec}" for spec in bind_ro),
        *(f"--bind={spec}" for spec in bind),
    ]


def enter_argv(pid1: int) -> list[str]:
    """The prefix that enters all of the guest's namespaces, its cgroup namespace and root included.

    Absolute paths: this is what makes the guest's systemd-run resolve names with its own PATH.
    """
    nsenter = shutil.which("nsenter", path=host.SEARCH_PATH) or "nsenter"
    return [nsenter, "-t", str(pid1), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"]


def find_pid1(guardian: int) -> int | None:
    """The guest's PID 1 as the host numbers it: one pid namespace below the guardian's."""
    depth = len(_ns_pids(guardian))
    waiting = [guardian]
    while waiting:
        pid = waiting.pop()
        pids = _ns_pids(pid)
        if len(pids) == depth + 1 and pids[-1] == 1:
            return pid
        waiting += children(pid)
    return None


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue  # ended while we looked
    return found


def _ns_pids(pid: int) -> list[int]:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return []
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return []
