"""Processes that left the cgroup of their unit: found again, since a cgroup's kill misses them.

Only an engine that runs as root can move to another cgroup, as a container runtime does with its
containers. What was seen in a unit, and everything below it in the process tree, stays the unit's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.process import Process, ProcessKey, key_of, read_stat
from llmux.ports import UnitHandle

log = logging.getLogger(__name__)

Members = Callable[[], Iterable[int]]  # the processes in the unit's cgroup now


def _living(pid: int) -> ProcessKey | None:
    stat = read_stat(pid)
    return (pid, stat[1]) if stat is not None and stat[2] not in "ZX" else None


class Families:
    """Every process seen in each unit. Owner of nothing: processes end through their pidfds."""

    def __init__(self) -> None:
        self._seen: dict[ProcessKey, set[ProcessKey]] = {}  # by the unit's root process
        self._reported: set[ProcessKey] = set()

    def note(self, handle: UnitHandle, members: Iterable[int]) -> list[int]:
        """Remember the members. Returns those seen before that live outside the cgroup."""
        now = {key for pid in members if (key := _living(pid)) is not None}
        seen = self._seen.setdefault(key_of(handle), {key_of(handle)})
        outside = sorted(key for key in seen - now if _living(key[0]) == key)
        seen.clear()
        seen.update(now, outside, [key_of(handle)])
        self._report(handle, outside)
        return [pid for pid, _ in outside]

    async def find_outside(self, handle: UnitHandle, members: Iterable[int]) -> list[ProcessKey]:
        """As ``note``, with all their descendants: one pass over /proc, in a thread."""
        inside = set(members)
        roots = {*inside, *self.note(handle, inside)}
        below = await asyncio.to_thread(_below, roots)
        found = sorted(
            key for pid in roots | below if pid not in inside and (key := _living(pid)) is not None
        )
        self._seen.setdefault(key_of(handle), set()).update(found)
        self._report(handle, found)
        return found

    def forget(self, handle: UnitHandle) -> None:
        self._reported -= self._seen.pop(key_of(handle), set())

    def _report(self, handle: UnitHandle, outside: Iterable[ProcessKey]) -> None:
        """One line for all that are new: an engine may move thousands."""
        new = [key for key in outside if key not in self._reported]
        if not new:
            return
        self._reported.update(new)
        log.warning(
            "process %d of %s left its cgroup for %s%s",
            new[0][0],
            handle.unit,
            cgroup.cgroup_of(new[0][0]),
            f", as did {len(new) - 1} more" if len(new) > 1 else "",
            extra={"model": handle.model, "unit": handle.unit},
        )

    async def kill_outside(self, handle: UnitHandle, members: Members, end: float) -> list[int]:
        """Kill what is outside the cgroup; returns what still lives at ``end`` (monotonic).

        Stopped first: what is stopped forks nothing that this pass over /proc would miss.
        """
        held: dict[ProcessKey, Process] = {}
        try:
            while new := [
                key for key in await self.find_outside(handle, members()) if key not in held
            ]:
                for key in new:
                    if (process := Process.open(*key)) is not None:
                        held[key] = process
                        process.signal(signal.SIGSTOP)
            for process in held.values():
                process.signal(signal.SIGKILL)
            for process in held.values():
                await process.wait(max(end - time.monotonic(), 0.001))
            return [pid for (pid, _), process in held.items() if process.ended is None]
        finally:
            for process in held.values():
                process.close()


def _below(roots: Iterable[int]) -> set[int]:
    """All descendants of the processes, zombies too: a thread of theirs may have children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := read_stat(int(name))) is not None:
            children.setdefault(stat[0], []).append(int(name))
    found: set[int] = set()
    todo = list(roots)
    while todo:
        for pid in children.get(todo.pop(), []):
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found
