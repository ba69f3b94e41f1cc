"""Was an engine killed for want of memory, and past which limit? By the kernel's own counters.

An engine's cgroup vanishes with its last process. The counters of the slice above include those of
all cgroups that ever were in it, so they tell it then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Counters:
    """Of memory.events: processes that were killed for memory, and times a limit was hit."""

    killed: int = 0
    at_limit: int = 0


class Oom:
    """``root``: where cgroup2 is mounted; ``above``: the slice of all engines, below it."""

    def __init__(self, root: str, above: str) -> None:
        self._root = root
        self._above = above
        self._last = self._counters(above) or _Counters()
        self._limits: dict[str, int | None] = {}  # of watched units' cgroups; None: unlimited

    def watch(self, cgroup: str) -> None:
        """Remember the limit, which cannot be read any more when the cgroup is gone."""
        self._limits[cgroup] = self._limit(cgroup)

    def cause(self, cgroup: str, unit: str) -> str | None:
        """Why the unit's process was killed; None when not for memory. To be asked once for each
        end."""
        before, self._last = self._last, self._counters(self._above) or self._last
        own = self._counters(cgroup)
        limit = self._limits.pop(cgroup, None)
        if own is None:
            own = _Counters(
                self._last.killed - before.killed, self._last.at_limit - before.at_limit
            )
        if own.killed <= 0:
            return None
        if own.at_limit <= 0 or limit is None:
            return "the host ran out of memory"
        return f"it went past MemoryMax={limit / _MIB:.0f}M of {unit} (limits.memory_max)"

    def _counters(self, cgroup: str) -> _Counters | None:
        try:
            with open(f"{self._root}/{cgroup.lstrip('/')}/memory.events") as file:
                found = {key: int(value) for key, value in (line.split() for line in file)}
        except (OSError, ValueError):
            return None
        return _Counters(found.get("oom_kill", 0), found.get("oom", 0))

    def _limit(self, cgroup: str) -> int | None:
        """The least of its own and of those above."""
        limits = []
        path = cgroup.strip("/")
        while path:
            try:
                with open(f"{self._root}/{path}/memory.max") as file:
                    limits.append(int(file.read()))
            except (OSError, ValueError):
                pass  # "max", or no memory controller
            path = os.path.dirname(path)
        return min(limits, default=None)
