"""Reading and waiting on cgroup v2 directories. No writes here but ``cgroup.kill``.

Every function treats a directory that has vanished as empty: systemd removes a scope's cgroup as
soon as its last process has gone, between any two of our looks.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from contextlib import suppress

from llmux.drivers.processes.inotify import Inotify, Mask
from llmux.drivers.processes.process import read_stat

ENGINE = (
    "engine"  # the sub-cgroup that the launcher makes; made known to it by launcher.ENGINE_CGROUP
)

_VANISHED = (errno.ENOENT, errno.ENODEV)


def read_events(cgroup: str) -> dict[str, int] | None:
    """cgroup.events as a mapping, e.g. {"populated": 1, "frozen": 0}; None when the cgroup is
    gone."""
    try:
        with open(f"{cgroup}/cgroup.events") as file:
            return {key: int(value) for key, value in (line.split() for line in file)}
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise


def read_procs(cgroup: str) -> list[int]:
    """All processes in the cgroup and below it."""
    found: list[int] = []
    for directory, _, files in os.walk(cgroup):
        if "cgroup.procs" in files:
            with suppress(OSError), open(f"{directory}/cgroup.procs") as file:
                # 0 stands for a process outside our pid namespace
                found += [pid for line in file if (pid := int(line))]
    return found


def cgroup_of(pid: int) -> str | None:
    """The cgroup v2 path of a process as /proc shows it, None when it is gone."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            return next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), None)
    except (FileNotFoundError, ProcessLookupError):
        return None


def kill_all(cgroup: str) -> None:
    """SIGKILL to everything below; race-free against forks on kernels with cgroup.kill (5.14)."""
    # EOPNOTSUPP: a threaded cgroup. ENOENT: an older kernel, or it is gone. Then one by one.
    with suppress(OSError), open(f"{cgroup}/cgroup.kill", "w") as file:
        file.write("1")
        return
    for pid in read_procs(cgroup):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


async def wait_events(inotify: Inotify, cgroup: str, key: str, value: int, timeout: float) -> bool:
    """True when cgroup.events was seen to say ``key value`` within ``timeout`` seconds.

    A vanished cgroup counts as ``populated 0`` and as nothing else. The kernel tells inotify of
    every change, but holds a second one within 10 ms back (CGROUP_FILE_NOTIFY_MIN_INTV), and a
    freeze takes 0.1 ms: so we look again by ourselves too, after 0.2 ms and then ever more rarely.
    """
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    pause = 0.0002
    try:
        watch = inotify.watch(
            f"{cgroup}/cgroup.events", Mask.MODIFY | Mask.DELETE_SELF, lambda *_: changed.set()
        )
    except FileNotFoundError:
        return key == "populated" and value == 0
    try:
        while True:
            changed.clear()
            events = read_events(cgroup)
            if events is None:
                return key == "populated" and value == 0
            if events.get(key) == value:
                return True
            if (left := end - loop.time()) <= 0:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(min(pause, left)):
                    await changed.wait()
            pause = min(pause * 2, 0.25)
    finally:
        inotify.unwatch(watch)


def engine_directory(root: str, cgroup: str) -> str:
    """Absolute path of a unit's ``engine/`` sub-cgroup."""
    return f"{root}{cgroup}/{ENGINE}"


def write_freeze(directory: str, value: str) -> None:
    """``cgroup.freeze``; raises OSError. The kernel answers before it is done: see wait_events."""
    with open(f"{directory}/cgroup.freeze", "w") as file:
        file.write(value)


def process_state(pid: int) -> str:
    """The state letter of /proc/PID/stat, "X" when it is gone."""
    stat = read_stat(pid)
    return stat[2] if stat else "X"
