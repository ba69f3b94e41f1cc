"""What a guest that has ended must not have left behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from _lab import state  # noqa: E402 (the path first)


def processes_of(name: str) -> list[int]:
    """Those outside of a guest that carry its name: its guardian, and whose child that is."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended
            if str(state.directory_of(name)).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def leftovers(name: str) -> list[str]:
    """Processes, mounts, cgroups and directories that still carry a guest's name."""
    found = []
    directory = str(state.directory_of(name))
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            mounts = (process / "mountinfo").read_text()
            cgroups = (process / "cgroup").read_text()
        except OSError:
            continue  # ended, or a zombie
        if directory in command:
            found.append(f"process {process.name}: {command}")
        if directory in mounts:
            found.append(f"mount seen by process {process.name}")
        if state.cgroup_name(name) in cgroups:
            found.append(f"process {process.name} in the guest's cgroup")
    found += [str(path) for path in pathlib.Path("/sys/fs/cgroup").glob(f"*/llmux-lab-{name}")]
    if os.path.exists(directory):
        found.append(directory)
    return found
