"""Engine units as transient systemd scopes: started, ended, found again and watched.

The child waits at a gate while systemd puts it into ``llmux-<model>.scope``; it goes through only
when the scope was *seen* to be active around it, so everything that it forks is born in the scope.
Scopes are in ``llmux.slice`` and tied to no service: they outlive a restart of the supervisor, and
``observe`` finds them again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.directories import prepare_directories
from llmux.drivers.processes.family import Families
from llmux.drivers.processes.inotify import Inotify
from llmux.drivers.processes.listeners import find_stranger
from llmux.drivers.processes.oom import Oom
from llmux.drivers.processes.process import (
    Process,
    ProcessKey,
    Watches,
    cpu_seconds,
    find_root,
    key_of,
    memory_bytes,
    start_ticks,
)
from llmux.drivers.processes.spawn import (
    Launch,
    Launchers,
    model_of,
    unit_name,
)
from llmux.drivers.systemd.bus import Bus, BusThread
from llmux.drivers.systemd.scope import SLICE, Scopes
from llmux.errors import DriverTimeout
from llmux.ports import LaunchSpec, UnitHandle
from llmux.protocol import Address

log = logging.getLogger(__name__)


class SystemdUnits:
    """UnitManager on transient scopes. Needs root, cgroup v2 and a systemd as PID 1.

    ``cgroup_root``: where cgroup2 is mounted.
    """

    def __init__(
        self, cgroup_root: str = "/sys/fs/cgroup", *, launchers: Launchers | None = None
    ) -> None:
        self._root = cgroup_root
        self._launchers = launchers or Launchers()
        self._bus = BusThread()
        self._scopes = Scopes(self._bus, cgroup_root)
        self._inotify: Inotify | None = None
        self._processes: dict[ProcessKey, Process] = {}
        self._watches = Watches()
        self._families = Families()
        self._oom = Oom(cgroup_root, SLICE)

    async def start(self, spec: LaunchSpec, deadline: float) -> UnitHandle:
        unit = unit_name(spec.model)
        await asyncio.to_thread(prepare_directories, spec)
        end = time.monotonic() + deadline
        launch = self._launchers.take()
        pid, ticks = launch.process.pid, launch.process.ticks
        self._keep(launch.process)
        making = asyncio.ensure_future(self._scopes.make(spec, unit, launch, end))
        try:
            path = await asyncio.shield(making)
            handle = UnitHandle(spec.model, unit, pid, ticks, path)
            left = max(end - time.monotonic(), 0.001)
            await launch.open(spec, left, cgroup_root=self._root, guardian=False)
        except BaseException:
            await asyncio.shield(self._give_up(unit, launch, making))
            raise
        launch.close()
        return handle

    async def terminate(self, handle: UnitHandle, deadline: float) -> bool:
        assert handle.cgroup is not None
        # A frozen process keeps SIGTERM pending and never acts on it.
        with suppress(OSError):
            cgroup.write_freeze(cgroup.engine_directory(self._root, handle.cgroup), "0")
        # Before they lose their parent, by which those outside the cgroup are found.
        await self._families.find_outside(handle, self._members(handle))
        process = self._processes.get(key_of(handle))
        opened = None
        if process is None or process.ended is not None:
            process = opened = Process.open(*key_of(handle))
        end = time.monotonic() + deadline
        try:
            if process is not None:
                process.signal(signal.SIGTERM)
            directory = self._root + handle.cgroup
            empty = await cgroup.wait_events(self._events, directory, "populated", 0, deadline)
            if empty and process is not None:
                # The cgroup counts no zombies; ours must be reaped before its pid can be restored.
                await process.wait(max(end - time.monotonic(), 0.001))
            return empty and not self._families.note(handle, ())
        finally:
            if opened is not None:
                opened.close()

    async def kill(self, handle: UnitHandle, deadline: float) -> None:
        assert handle.cgroup is not None
        directory = self._root + handle.cgroup
        end = time.monotonic() + deadline
        await self._families.find_outside(handle, self._members(handle))
        # cgroup.kill is race-free; the loop is for kernels without it, where a fork can slip away.
        while True:
            cgroup.kill_all(directory)
            left = end - time.monotonic()
            if await cgroup.wait_events(self._events, directory, "populated", 0, min(left, 0.5)):
                break
            if left <= 0:
                raise DriverTimeout(
                    "kill",
                    f'model "{handle.model}"',
                    f"{len(cgroup.read_procs(directory))} processes of {handle.unit} are still"
                    f" there after {deadline:g}s",
                    hint="a process in uninterruptible sleep (state D) waits for its driver",
                )
        await self._kill_outside(handle, end)
        await self._scopes.await_gone(handle.unit, handle.model, end)
        process = self._processes.get(key_of(handle))
        if process is not None and await process.wait(max(end - time.monotonic(), 0.001)):
            self._processes.pop(key_of(handle), None)
        self._families.forget(handle)

    def _members(self, handle: UnitHandle) -> list[int]:
        assert handle.cgroup is not None
        return cgroup.read_procs(self._root + handle.cgroup)

    async def _kill_outside(self, handle: UnitHandle, end: float) -> None:
        left = await self._families.kill_outside(handle, lambda: self._members(handle), end)
        if left:
            raise DriverTimeout(
                "kill",
                f'model "{handle.model}"',
                f"processes {left} left its cgroup and are still there",
                hint="a process in uninterruptible sleep (state D) waits for its driver",
            )

    async def observe(self) -> Sequence[UnitHandle]:
        def look(bus: Bus) -> list[tuple[str, str]]:
            return [(unit.name, bus.control_group(unit)) for unit in bus.list_units()]

        handles = []
        for unit, path in await self._bus.call("observe", "the engine units", look):
            if f"/{SLICE}/" not in f"{path}/":
                continue  # a foreign scope of that name, or one that has just ended
            directory = self._root + path
            pid = find_root(cgroup.read_procs(f"{directory}/{cgroup.ENGINE}"))
            if pid is None:
                pid = find_root(cgroup.read_procs(directory))
            if pid is not None and (ticks := start_ticks(pid)) is not None:
                handles.append(UnitHandle(model_of(unit), unit, pid, ticks, path))
            elif not cgroup.read_procs(directory):
                log.warning("%s is active without a process: stopped", unit)
                await self._stop_empty(unit)
        return handles

    async def _stop_empty(self, unit: str) -> None:
        await self._bus.call("stop", unit, lambda bus: bus.stop_unit(unit))

    async def ending(self) -> bool:
        """Has our slice a stop job? At shutdown it has one, too."""
        return await self._bus.call("look at", SLICE, lambda bus: bus.has_stop_job(SLICE))

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        members = self._members(handle)
        return [*members, *self._families.note(handle, members)]

    async def stranger(self, address: Address, handle: UnitHandle | None) -> str | None:
        if handle is None and address.port is None:
            return None  # the directory of its socket is emptied by the start
        pids = () if handle is None else await self.pids(handle)
        return await asyncio.to_thread(find_stranger, address, pids)

    async def cpu_seconds(self, handle: UnitHandle) -> float:
        return cpu_seconds(await self.pids(handle))

    async def memory_bytes(self, handle: UnitHandle) -> int:
        return memory_bytes(await self.pids(handle))

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        key = key_of(handle)
        self._watches.add(handle, on_exit)
        process = self._processes.get(key) or Process.open(*key)
        if process is None:
            asyncio.get_running_loop().call_soon(self._ended, key, "gone")
            return
        self._processes[key] = process
        if handle.cgroup:
            self._oom.watch(handle.cgroup)

        def ended(process: Process) -> None:
            description = process.ended or "gone"
            if handle.cgroup and (cause := self._oom.cause(handle.cgroup, handle.unit)):
                description = f"{description}: {cause}"
            self._ended(key, description)

        process.on_end(ended)

    def unwatch(self, handle: UnitHandle) -> None:
        self._watches.remove(handle)

    async def close(self) -> None:
        self._watches.clear()
        await self._launchers.close()
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        await self._bus.close()

    @property
    def _events(self) -> Inotify:
        if self._inotify is None:
            self._inotify = Inotify()
        return self._inotify

    def _keep(self, process: Process) -> None:
        # Ended ones are kept until their unit is killed, so that a late watch still learns how.
        self._processes[process.pid, process.ticks] = process

    def _ended(self, key: ProcessKey, description: str) -> None:
        self._processes.pop(key, None)
        self._watches.report(key, description)

    async def _give_up(self, unit: str, launch: Launch, making: asyncio.Future[str]) -> None:
        """Clean up after a failed start; the first error is the one to raise."""
        # systemd keeps a scope for good whose process died on the way into it (257): when we were
        # cancelled, it is to get there first.
        await asyncio.wait([making])
        # Closing the gate is enough for a launcher that waits at it; a kill for one beyond.
        launch.close()
        launch.process.signal(signal.SIGKILL)
        if not await launch.process.wait(2.0):
            log.warning("the launcher of %s (pid %d) does not die", unit, launch.process.pid)
            return
        self._processes.pop((launch.process.pid, launch.process.ticks), None)
        await self._scopes.clean(unit)
