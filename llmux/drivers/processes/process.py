"""Processes as the kernel shows them: identity, family, end. Shared by the unit managers.

A pid alone names nothing for long; pid and start time (field 22 of /proc/PID/stat) together do.
Read by hand: the creation time of psutil is those ticks added to the boot time, which moves when
the clock is set.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

from llmux.ports import UnitHandle

ProcessKey = tuple[int, int]  # pid and start ticks


def read_stat(pid: int) -> tuple[int, int, str] | None:
    """(parent pid, start ticks, state letter) of a process, None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may itself hold spaces and parentheses: cut at the last one.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), int(fields[19]), fields[0].decode()


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes that there are."""
    ticks = 0
    for pid in pids:
        with suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(pids: Iterable[int]) -> int:
    """Resident memory of the processes that there are, but for mapped files. What several share
    counts for each."""
    kib = 0
    for pid in pids:
        with suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    kib += int(line.split()[1])
    return kib * 1024


def start_ticks(pid: int) -> int | None:
    """Start time in clock ticks since boot, None when there is no such process."""
    stat = read_stat(pid)
    return stat[1] if stat else None


def find_root(pids: Iterable[int]) -> int | None:
    """The root of a tree: the oldest process whose parent is not in it. None when all are gone."""
    stats = {pid: stat for pid in pids if (stat := read_stat(pid)) and stat[2] not in "ZX"}
    roots = [pid for pid, stat in stats.items() if stat[0] not in stats]
    return min(roots or stats, key=lambda pid: (stats[pid][1], pid), default=None)


def descendants(root: int) -> list[int]:
    """All live processes below ``root``, found by one pass over /proc."""
    below: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := read_stat(int(name))) and stat[2] not in "ZX":
            below.setdefault(stat[0], []).append(int(name))
    found: list[int] = []
    todo = [root]
    while todo:
        more = below.get(todo.pop(), [])
        found += more
        todo += more
    return found


def describe_status(code: int, status: int) -> str:
    """What waitid said, for people: "exit status 1", "killed by SIGKILL"."""
    if code == os.CLD_EXITED:
        return f"exit status {status}"
    try:
        name = signal.Signals(status).name
    except ValueError:  # a real-time signal has no name of its own
        name = f"signal {status}"
    return f"killed by {name}" + (" (core dumped)" if code == os.CLD_DUMPED else "")


class Watches:
    """Callbacks for the exit of a unit's root process: each called once, none after ``remove``."""

    def __init__(self) -> None:
        self._callbacks: dict[ProcessKey, tuple[UnitHandle, Callable[[UnitHandle, str], None]]] = {}

    def add(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        self._callbacks[key_of(handle)] = (handle, on_exit)

    def remove(self, handle: UnitHandle) -> None:
        self._callbacks.pop(key_of(handle), None)

    def report(self, key: ProcessKey, description: str) -> None:
        if (entry := self._callbacks.pop(key, None)) is not None:
            handle, on_exit = entry
            on_exit(handle, description)

    def clear(self) -> None:
        self._callbacks.clear()


def key_of(handle: UnitHandle) -> ProcessKey:
    return handle.pid, handle.start_ticks


class Process:
    """One process, held by a pidfd; its end is seen by the event loop at once.

    Our own children are reaped then and there: CRIU cannot restore a pid that a zombie holds.
    ``ended`` is None until the end, then "exit status N", "killed by SIGX", or "gone" for a process
    that was not our child. ``code`` is the exit status or -signal, None for non-children.
    """

    def __init__(self, pid: int, ticks: int, pidfd: int, loop: asyncio.AbstractEventLoop) -> None:
        self.pid = pid
        self.ticks = ticks
        self.ended: str | None = None
        self.code: int | None = None
        self._pidfd = pidfd
        self._loop = loop
        self._callbacks: list[Callable[[Process], None]] = []
        loop.add_reader(pidfd, self._on_end)

    @classmethod
    def open(cls, pid: int, ticks: int | None = None) -> Process | None:
        """Hold a process; None when it is gone, or when another has its pid by now."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        have = start_ticks(pid)
        # Read after pidfd_open: if the ticks match now, the pidfd is that process's.
        if have is None or (ticks is not None and have != ticks):
            os.close(pidfd)
            return None
        return cls(pid, have, pidfd, asyncio.get_running_loop())

    def on_end(self, callback: Callable[[Process], None]) -> None:
        """Call back in the loop once the process has ended (soon, when it has already)."""
        if self.ended is not None:
            self._loop.call_soon(callback, self)
        else:
            self._callbacks.append(callback)

    def signal(self, number: int) -> bool:
        """Send a signal; False when the process is gone. Never hits a reused pid."""
        if self._pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    async def wait(self, timeout: float) -> bool:
        """True when the process has ended within ``timeout`` seconds."""
        if self.ended is None:
            done = asyncio.Event()

            def callback(_: Process) -> None:
                done.set()

            self._callbacks.append(callback)
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await done.wait()
            with suppress(ValueError):
                self._callbacks.remove(callback)
        return self.ended is not None

    def close(self) -> None:
        """Stop looking. The process itself is left alone."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._callbacks.clear()

    def _on_end(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            self.ended = "gone"
        else:
            if result is None:
                return  # readable, but a ptracer still holds it; we are called again
            self.ended = describe_status(result.si_code, result.si_status)
            exited = result.si_code == os.CLD_EXITED
            self.code = result.si_status if exited else -result.si_status
        callbacks, self._callbacks = self._callbacks, []
        self.close()
        for callback in callbacks:
            callback(self)
