"""Can host memory take what processes hold on their GPUs?

A CUDA checkpoint copies device memory into anonymous host memory *inside the process*: it cannot be
dropped by the kernel, only swapped, and counts against the process's cgroup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llmux.drivers.memory import available_bytes

GIB = 1 << 30
OVERHEAD_SHARE = 0.02  # page tables (1/512) and the driver's own book-keeping
RESERVE_BYTES = 1 * GIB  # must stay free for the rest of the machine


def required_host_bytes(gpu_used_bytes: int) -> int:
    """Host memory that must be free before ``gpu_used_bytes`` are copied out of the GPUs."""
    return gpu_used_bytes + int(gpu_used_bytes * OVERHEAD_SHARE) + RESERVE_BYTES


class HostMemory:
    """MemAvailable and cgroup v2 memory limits; where they are read is an argument for tests."""

    def __init__(
        self,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._available = available

    def headroom(self, pid: int) -> tuple[int, str] | None:
        """(bytes, cgroup) of the tightest memory limit above ``pid``; None without a limit."""
        try:
            line = (self._proc / str(pid) / "cgroup").read_text().strip().splitlines()[-1]
        except (OSError, IndexError):
            return None
        hierarchy, _, name = line.partition("::")
        if hierarchy != "0":
            return None
        found: tuple[int, str] | None = None
        path = Path(name.lstrip("/"))
        for group in (path, *path.parents):
            left = self._left(self._cgroups / group)
            if left is not None and (found is None or left < found[0]):
                found = left, str(group)
        return found

    def _left(self, directory: Path) -> int | None:
        try:
            limit = (directory / "memory.max").read_text().strip()
            if limit == "max":
                return None
            used = int((directory / "memory.current").read_text())
            stat = dict(
                line.split() for line in (directory / "memory.stat").read_text().splitlines()
            )
        except (OSError, ValueError):
            return None
        # Page cache is counted in memory.current and given up when memory is asked for.
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        return int(limit) - used + cache

    def shortage(self, pids: Sequence[int], gpu_used_bytes: int) -> str | None:
        """Why it does not fit, None when it does."""
        need = required_host_bytes(gpu_used_bytes)
        what = (
            f"{need / GIB:.1f} GiB of host memory are needed, because everything on the GPU moves "
            f"there ({gpu_used_bytes / GIB:.1f} GiB: weights that were retained *and* the KV cache)"
        )
        available = self._available()
        if available < need:
            return f"{what}, but MemAvailable is {available / GIB:.1f} GiB"
        for pid in pids:
            left = self.headroom(pid)
            if left is not None and left[0] < need:
                return f"{what}, but MemoryMax of {left[1]} leaves {left[0] / GIB:.1f} GiB"
        return None
