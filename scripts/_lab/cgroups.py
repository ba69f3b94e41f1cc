"""A cgroup of its own for each guest.

systemd-nspawn with --keep-unit makes its "payload" cgroup below the cgroup it is started in; two
guests started in the same one would share it, and each would see (and stop) the other's units.
Both hierarchies that systemd uses count: cgroup2, and on hosts with cgroup v1 also name=systemd.

Where v1 has the cpu controller a guest's systemd cannot use it, so that CPUWeight= of llmux's units
is void and every session is a scheduling group of its own (autogroup). Beside a vLLM on the CPU,
whose threads spin with sched_yield(2), another group of equal weight then waits for a processor for
up to 20 s (kernel 6.18, 2 processors); with ten times the weight, or without groups, for 0.2 s. So
a guest's processes are one group, of a tenth of the weight of the programs that talk to them.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time

Seat = tuple[pathlib.Path, pathlib.Path]  # (the cgroup we came from, the guest's own below it)

SHARES = 102  # of 1024


def seats(name: str) -> list[Seat]:
    """Where the calling process's cgroups are, and where the guest's would be."""
    found = []
    for hierarchy, mount_point in _mounted().items():
        for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if hierarchy == ("cgroup2" if number == "0" else controllers):
                base = mount_point / path.lstrip("/")
                found.append((base, base / name))
    return found


def _mounted() -> dict[str, pathlib.Path]:
    """The first mount point of cgroup2 and of the v1 hierarchies with systemd's name or the cpu
    controller, by what /proc/PID/cgroup calls them."""
    found: dict[str, pathlib.Path] = {}
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        mount_point = pathlib.Path(before.split(" ")[4])
        if kind == "cgroup2":
            found.setdefault("cgroup2", mount_point)
        elif kind == "cgroup":
            words = options.split(",")
            if "name=systemd" in words:
                found.setdefault("name=systemd", mount_point)
            elif "cpu" in words:
                together = [word for word in words if word in ("cpu", "cpuacct")]
                found.setdefault(",".join(together), mount_point)
    return found


def enter(taken: list[Seat]) -> None:
    for _, own in taken:
        own.mkdir(exist_ok=True)
        if (shares := own / "cpu.shares").exists():
            shares.write_text(str(SHARES))
        (own / "cgroup.procs").write_text("0")


def leave(taken: list[Seat]) -> None:
    for base, own in taken:
        with contextlib.suppress(OSError):
            (base / "cgroup.procs").write_text("0")
        remove_tree(own)


def remove_tree(top: pathlib.Path) -> None:
    """Remove an empty cgroup with all below it; a just-killed process may keep it busy a moment."""
    deadline = time.monotonic() + 2
    while top.is_dir():
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        if time.monotonic() > deadline:
            return
        if top.is_dir():
            time.sleep(0.01)
