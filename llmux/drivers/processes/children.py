"""Engine units as plain child processes, for the embedded mode: no root, no systemd, no cgroups.

Each engine has a guardian (the launcher in guardian mode), which is the sub-reaper of all that the
engine forks and holds the other end of a pipe that only we keep open. Whatever happens to us,
SIGKILL included, closes the pipe, and the guardian kills the tree: nothing outlives the embedded
server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from llmux.drivers.processes.directories import prepare_directories
from llmux.drivers.processes.listeners import find_stranger
from llmux.drivers.processes.process import (
    Process,
    ProcessKey,
    Watches,
    cpu_seconds,
    descendants,
    find_root,
    key_of,
    memory_bytes,
    start_ticks,
)
from llmux.drivers.processes.spawn import spawn_launcher, unit_name
from llmux.errors import DriverTimeout, UnitFailed
from llmux.ports import LaunchSpec, UnitHandle
from llmux.protocol import Address

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Guarded:
    handle: UnitHandle
    guardian: Process
    gate: int  # the lifeline; closing it kills the tree

    def cut(self) -> None:
        if self.gate >= 0:
            os.close(self.gate)
            self.gate = -1


class DirectUnits:
    """UnitManager on child processes. Knows only the engines that it started itself."""

    def __init__(self) -> None:
        self._units: dict[str, _Guarded] = {}
        self._watches = Watches()
        self._ended: dict[ProcessKey, str] = {}

    async def start(self, spec: LaunchSpec, deadline: float) -> UnitHandle:
        unit = unit_name(spec.model, suffix="")
        target = f'model "{spec.model}"'
        if (held := self._units.get(unit)) is not None:
            raise UnitFailed("start", target, f"it is running already (pid {held.handle.pid})")
        await asyncio.to_thread(prepare_directories, spec)
        launch = spawn_launcher()
        guardian = launch.process
        try:
            await launch.open(spec, deadline, cgroup_root=None, guardian=True)
            ticks = start_ticks(launch.engine_pid) or 0  # 0: ended already; the guardian knows how
        except BaseException:
            launch.close()  # end of file at the gate: the guardian kills what there is
            if not await asyncio.shield(guardian.wait(5.0)):
                guardian.signal(signal.SIGKILL)
            raise
        handle = UnitHandle(spec.model, unit, launch.engine_pid, ticks)
        guarded = _Guarded(handle, guardian, launch.take_gate())
        launch.close()
        self._units[unit] = guarded
        guardian.on_end(lambda ended: self._on_end(guarded, ended.ended or "gone"))
        return handle

    async def terminate(self, handle: UnitHandle, deadline: float) -> bool:
        guarded = self._find(handle)
        if guarded is None:
            return True
        engine = Process.open(*key_of(handle))
        if engine is not None:
            engine.signal(signal.SIGTERM)
            engine.close()
        # The guardian kills what the root leaves behind, then ends too.
        return await guarded.guardian.wait(deadline)

    async def kill(self, handle: UnitHandle, deadline: float) -> None:
        guarded = self._find(handle)
        if guarded is None:
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline
        guarded.cut()
        # It may have been stopped (SIGSTOP).
        guarded.guardian.signal(signal.SIGCONT)
        if await guarded.guardian.wait(deadline / 2):
            return
        # A guardian that does not do its work: do it for it, the root of the tree last.
        while True:
            for pid in descendants(guarded.guardian.pid):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if await guarded.guardian.wait(0.1):
                return
            if loop.time() >= end:
                raise DriverTimeout(
                    "kill",
                    f'model "{handle.model}"',
                    f"{len(await self.pids(handle))} of its processes are still there after"
                    f" {deadline:g}s",
                    hint="a process in uninterruptible sleep (state D) waits for its driver",
                )

    async def observe(self) -> Sequence[UnitHandle]:
        return [held.handle for held in self._units.values() if held.guardian.ended is None]

    async def ending(self) -> bool:
        return False  # only we stop our children

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        guarded = self._find(handle)
        if guarded is None or guarded.guardian.ended is not None:
            return []
        found = descendants(guarded.guardian.pid)
        root = find_root(found)
        return sorted(found, key=lambda pid: (pid != root, pid))

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
        if self._find(handle) is None:
            description = self._ended.get(key, "gone")
            asyncio.get_running_loop().call_soon(self._watches.report, key, description)

    def unwatch(self, handle: UnitHandle) -> None:
        self._watches.remove(handle)

    async def close(self) -> None:
        """Kill every engine and see them gone, within 10 s each. What is not is in the log."""
        self._watches.clear()
        held = list(self._units.values())
        for guarded in held:
            guarded.cut()
        for guarded in held:
            handle = guarded.handle
            try:
                await self.kill(handle, 10.0)
            except DriverTimeout as error:
                left = ", ".join(map(str, [*await self.pids(handle), guarded.guardian.pid]))
                log.warning(
                    "%s is left behind, with processes %s: %s", handle.unit, left, error,
                    extra={"model": handle.model, "unit": handle.unit},
                )  # fmt: skip

    def _find(self, handle: UnitHandle) -> _Guarded | None:
        guarded = self._units.get(handle.unit)
        return guarded if guarded is not None and guarded.handle == handle else None

    def _on_end(self, guarded: _Guarded, description: str) -> None:
        guarded.cut()
        handle = guarded.handle
        if self._units.get(handle.unit) is guarded:
            del self._units[handle.unit]
        key = key_of(handle)
        # For a watch that comes late; bounded, oldest first.
        self._ended[key] = description
        while len(self._ended) > 64:
            del self._ended[next(iter(self._ended))]
        self._watches.report(key, description)
