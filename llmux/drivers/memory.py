"""The host's memory and disks, as psutil reads them.

What psutil does not give as exactly is read by hand where it is needed: a process's start in clock
ticks (psutil's is a time that moves with the clock), its threads, sockets and mappings, cgroups.
"""

from __future__ import annotations

import os
import re

import psutil


def available_bytes() -> int:
    """MemAvailable: what the kernel can give without swapping."""
    return int(psutil.virtual_memory().available)


def swap_bytes() -> int:
    return int(psutil.swap_memory().total)


def disk_space(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns (total, free for an unprivileged writer). Raises OSError."""
    usage = psutil.disk_usage(os.fspath(path))
    return usage.total, usage.free


class Pressure:
    """Pressure stall information (Linux 4.20; some kernels need psi=1)."""

    def __init__(self, path: str = "/proc/pressure/memory") -> None:
        self._path = path

    def stalled_percent(self) -> float | None:
        """The average over 10 s of the line ``full``."""
        try:
            with open(self._path, encoding="ascii") as file:
                lines = file.read().splitlines()
        except (OSError, ValueError):
            return None
        for line in lines:
            if (found := re.match(r"full avg10=([0-9]{1,3}\.[0-9]{1,3}) ", line)) is not None:
                return float(found[1])
        return None
