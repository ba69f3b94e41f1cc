"""The cgroup v2 freezer, on the ``engine/`` sub-cgroup of a unit.

Not systemd's FreezeUnit: that holds the D-Bus call, and pystemd the GIL, until the freeze is
complete, and from version 256 on systemd refuses to stop what it has frozen. A freeze of a
delegated subtree stays our own affair: systemd goes on seeing a running scope and can stop it at
any time.
"""

from __future__ import annotations

import errno
import os

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.inotify import Inotify
from llmux.errors import FreezeFailed, Unsupported
from llmux.ports import UnitHandle


class CgroupFreezer:
    """``root`` is where cgroup2 is mounted. Holds one inotify descriptor; ``close`` gives it up."""

    def __init__(self, root: str = "/sys/fs/cgroup") -> None:
        self._root = root
        self._inotify: Inotify | None = None

    async def freeze(self, handle: UnitHandle, deadline: float) -> None:
        directory = self._directory("freeze", handle)
        try:
            self._write("freeze", handle, directory, "1")
            if await cgroup.wait_events(self._events, directory, "frozen", 1, deadline):
                return
        except BaseException:
            self._thaw_anyway(directory)
            raise
        states = [cgroup.process_state(pid) for pid in cgroup.read_procs(directory)]
        self._thaw_anyway(directory)
        if not states or cgroup.read_events(directory) is None:
            raise FreezeFailed("freeze", f'model "{handle.model}"', f"{handle.unit} is gone")
        stuck = states.count("D")
        raise FreezeFailed(
            "freeze",
            f'model "{handle.model}"',
            f"not all of its {len(states)} processes stopped within {deadline:g}s"
            + (f", {stuck} in uninterruptible sleep" if stuck else ""),
            hint="it was thawed again; see /proc/PID/stack of those in state D",
        )

    async def thaw(self, handle: UnitHandle, deadline: float) -> None:
        directory = self._directory("thaw", handle)
        self._write("thaw", handle, directory, "0")
        if await cgroup.wait_events(self._events, directory, "frozen", 0, deadline):
            return
        if cgroup.read_events(directory) is None:
            raise FreezeFailed("thaw", f'model "{handle.model}"', f"{handle.unit} is gone")
        raise FreezeFailed(
            "thaw",
            f'model "{handle.model}"',
            f"{handle.unit} still frozen after {deadline:g}s",
            hint="is one of its parent cgroups frozen (systemctl freeze llmux.slice)?",
        )

    async def frozen(self, handle: UnitHandle) -> bool:
        events = cgroup.read_events(self._directory("observe", handle))
        return bool(events and events.get("frozen"))

    async def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    @property
    def _events(self) -> Inotify:
        if self._inotify is None:
            self._inotify = Inotify()
        return self._inotify

    def _directory(self, operation: str, handle: UnitHandle) -> str:
        if handle.cgroup is None:
            raise Unsupported(
                operation,
                f'model "{handle.model}"',
                f"{handle.unit} has no cgroup of its own",
                hint="freezing needs llmux.service under systemd, not the embedded mode",
            )
        return cgroup.engine_directory(self._root, handle.cgroup)

    def _write(self, operation: str, handle: UnitHandle, directory: str, value: str) -> None:
        try:
            cgroup.write_freeze(directory, value)
        except OSError as error:
            target = f'model "{handle.model}"'
            if error.errno in (errno.ENOENT, errno.ENODEV):
                if os.path.isdir(directory):
                    raise Unsupported(
                        operation, target, "the kernel has no cgroup.freeze (needs 5.2)"
                    ) from error
                raise FreezeFailed(operation, target, f"{handle.unit} is gone") from error
            raise FreezeFailed(
                operation, target, f"{directory}/cgroup.freeze: {error.strerror}"
            ) from error

    def _thaw_anyway(self, directory: str) -> None:
        try:
            cgroup.write_freeze(directory, "0")
        except OSError:
            return  # gone, and then nothing is frozen
