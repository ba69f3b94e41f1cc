"""Units without systemd for short tests: ``llmux doctor --cuda`` and ``scripts/gpu-proof``.

Unlike ``children``'s, a unit holds what ``criu restore`` leaves there, in a plain cgroup or, where
there is no cgroup v2, in none (then the freezer says so itself). Unlike systemd's, it is not known
to any supervisor.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.directories import prepare_directories
from llmux.drivers.processes.launcher import PR_SET_CHILD_SUBREAPER
from llmux.drivers.processes.process import (
    Process,
    ProcessKey,
    cpu_seconds,
    descendants,
    key_of,
    memory_bytes,
    start_ticks,
)
from llmux.drivers.processes.spawn import spawn_launcher, unit_name
from llmux.errors import DriverTimeout
from llmux.ports import LaunchSpec, UnitHandle
from llmux.protocol import Address

log = logging.getLogger(__name__)

REAP_SECS = 0.01


def find_cgroup() -> tuple[str, str] | None:
    """(cgroup2 mount, our own path below it); None where no cgroup with a freezer can be made."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " not in line:
            continue
        root = line.split()[4]
        own = (cgroup.cgroup_of(os.getpid()) or "/").rstrip("/")
        trial = Path(f"{root}{own}/llmux-trial-{os.getpid()}")
        with suppress(OSError):
            trial.mkdir()
            usable = (trial / "cgroup.freeze").exists()
            trial.rmdir()
            if usable:
                return root, own
    return None


class BareUnits:
    """UnitManager for one tree at a time.

    Restored processes have no parent of ours, and PID 1 of a container may reap none: we do, as
    their sub-reaper. A zombie would keep its pid, which the next restore needs.
    """

    def __init__(self, place: tuple[str, str] | None) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._root = place[0] if place else None
        self._home = place[1] if place else ""
        self._numbers = itertools.count()
        self._processes: dict[ProcessKey, Process] = {}

    async def start(self, spec: LaunchSpec, deadline: float) -> UnitHandle:
        await asyncio.to_thread(prepare_directories, spec)
        launch = spawn_launcher()
        process = launch.process
        path = self._make_cgroup(process.pid)
        try:
            root = self._root if path else None
            await launch.open(spec, deadline, cgroup_root=root, guardian=False)
        except BaseException:
            process.signal(signal.SIGKILL)
            await asyncio.shield(process.wait(5.0))
            self._remove_cgroup(path)
            raise
        finally:
            launch.close()
        handle = UnitHandle(spec.model, unit_name(spec.model), process.pid, process.ticks, path)
        self._processes[key_of(handle)] = process
        return handle

    async def reap_restored(self, handle: UnitHandle) -> None:
        for pid in await self.pids(handle):
            process = Process.open(pid)
            if process is not None:
                self._processes[process.pid, process.ticks] = process

    @asynccontextmanager
    async def reaping(self, pids: Sequence[int]) -> AsyncIterator[None]:
        """While CRIU ends these processes of a unit: those whose parents went first are ours, as
        zombies perhaps, and hold their pids against the restore."""
        roots = {pid for pid, _ in self._processes}
        loop = asyncio.get_running_loop()
        reaper = loop.create_task(_reap(set(pids) - roots))
        try:
            yield
        finally:
            reaper.cancel()

    def _make_cgroup(self, pid: int) -> str | None:
        if self._root is None:
            return None
        path = f"{self._home}/llmux-trial-{os.getpid()}-{next(self._numbers)}"
        directory = Path(self._root + path)
        directory.mkdir()
        (directory / "cgroup.procs").write_text(str(pid))
        return path

    def _remove_cgroup(self, path: str | None) -> None:
        if self._root is not None and path is not None:
            for name in (f"{path}/{cgroup.ENGINE}", path):
                with suppress(OSError):
                    os.rmdir(self._root + name)

    async def terminate(self, handle: UnitHandle, deadline: float) -> bool:
        await self.kill(handle, deadline)
        return True

    async def kill(self, handle: UnitHandle, deadline: float) -> None:
        end = time.monotonic() + deadline
        seen: set[int] = set()
        while pids := await self.pids(handle):
            seen.update(pids)
            if handle.cgroup is not None:
                cgroup.kill_all(f"{self._root}{handle.cgroup}")
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                text = f"{len(pids)} processes are still there after {deadline:g}s"
                raise DriverTimeout("kill", f'model "{handle.model}"', text)
            await asyncio.sleep(0.02)
        self._remove_cgroup(handle.cgroup)
        process = self._processes.pop(key_of(handle), None)
        if process is not None:
            await process.wait(1.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await _reap(seen - {handle.pid})
        _tell_what_is_left(handle, seen, deadline)

    async def observe(self) -> Sequence[UnitHandle]:
        return ()

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        if handle.cgroup is not None:
            return cgroup.read_procs(f"{self._root}{handle.cgroup}")
        if (
            start_ticks(handle.pid) != handle.start_ticks
            or cgroup.process_state(handle.pid) in "ZX"
        ):
            return []
        return [handle.pid, *descendants(handle.pid)]

    async def stranger(self, address: Address, handle: UnitHandle | None) -> str | None:
        return None  # trials have unix sockets, or none

    async def cpu_seconds(self, handle: UnitHandle) -> float:
        return cpu_seconds(await self.pids(handle))

    async def memory_bytes(self, handle: UnitHandle) -> int:
        return memory_bytes(await self.pids(handle))

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        process = self._processes.get(key_of(handle)) or Process.open(*key_of(handle))
        if process is None:
            asyncio.get_running_loop().call_soon(on_exit, handle, "gone")
            return
        self._processes[key_of(handle)] = process  # or one that CRIU restored
        process.on_end(lambda ended: on_exit(handle, ended.ended or "gone"))

    def unwatch(self, handle: UnitHandle) -> None:
        """Callbacks may come late."""

    async def ending(self) -> bool:
        return False

    async def close(self) -> None:
        """Nothing is held."""


async def _reap(pids: set[int]) -> None:
    """Return when none of them is there, not even as a zombie."""
    while pids:
        for pid in pids:
            with suppress(ChildProcessError):  # not ours, or not yet
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  # it does not wait
        pids = {pid for pid in pids if start_ticks(pid) is not None}
        await asyncio.sleep(REAP_SECS)  # nothing tells that a process has become ours


def _tell_what_is_left(handle: UnitHandle, pids: set[int], deadline: float) -> None:
    left = ",".join(str(pid) for pid in sorted(pids) if start_ticks(pid) is not None)
    if left:
        log.warning(
            "cannot reap all of %s: after %gs processes %s are still there (next step:"
            " `ps -o pid,ppid,stat,comm -p %s`: a zombie (state Z) goes when its parent is ended,"
            " one in state D waits for its driver)",
            handle.unit, deadline, left, left,
            extra={"model": handle.model, "unit": handle.unit},
        )  # fmt: skip


def is_alive(handle: UnitHandle) -> bool:
    return (
        start_ticks(handle.pid) == handle.start_ticks
        and cgroup.process_state(handle.pid) not in "ZX"
    )
