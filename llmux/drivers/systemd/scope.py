"""The scope around one engine: its properties, and making it so that it is seen to hold.

systemd answers "done" before anything is certain; the scope counts only when it is active and the
launcher is in its cgroup. Never starts or kills a process.
"""

from __future__ import annotations

import logging
import operator
import os
import time
from contextlib import suppress
from typing import Any, Final

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.spawn import Launch
from llmux.drivers.systemd.bindings import KNOWN_UNIT_SIGNATURES, signature_array
from llmux.drivers.systemd.bus import Bus, BusThread, UnitExists, UnitNotKept
from llmux.errors import DriverError, DriverTimeout, UnitFailed
from llmux.ports import LaunchSpec

log = logging.getLogger(__name__)

SLICE: Final = "llmux.slice"
STOP_TIMEOUT: Final = 10.0  # seconds that `systemctl stop` of a scope gives it before SIGKILL
# A scope whose last process has gone is unloaded within milliseconds; after this we call it stuck.
NAME_FREE_TIMEOUT: Final = 3.0

RUN: Final = "/run"  # here systemd writes down what a transient unit is
_FULL_BYTES: Final = 64 * 1024  # less than some of these files, and what others write meanwhile

_INFINITY: Final = 2**64 - 1


class Scopes:
    """Makes scopes and waits until they are gone. ``cgroup_root``: where cgroup2 is mounted."""

    def __init__(self, bus: BusThread, cgroup_root: str) -> None:
        self._bus = bus
        self._root = cgroup_root

    async def make(self, spec: LaunchSpec, unit: str, launch: Launch, end: float) -> str:
        """The cgroup of a new scope that was seen to hold the launcher, by ``end`` (monotonic).

        Raises UnitFailed, and DriverTimeout when systemd has not reported the outcome.
        """
        properties = _properties(spec, launch.process.pid)
        target = f'model "{spec.model}"'
        cause = ""
        for attempt in (1, 2):
            try:
                result = await self._bus.call(
                    "start", target, lambda bus: bus.start_transient(unit, properties, end)
                )
            except UnitExists:
                if not await self._is_ours(unit, target, launch, last=attempt == 2):
                    await self._until_gone(unit, spec.model, end)
                    continue
                result = "done"
            except UnitNotKept as error:
                raise not_kept(target, unit, str(error), os.statvfs(RUN)) from error
            if launch.process.ended is not None:
                raise UnitFailed(
                    "start", target, f"its launcher ended early: {launch.process.ended}"
                )
            if result == "no answer":
                raise DriverTimeout("start", target, f"no result for the start job of {unit}")
            state, path = await self._look(unit, target)
            have = cgroup.cgroup_of(launch.process.pid)
            if state == "active" and path and have == path:
                return path
            # systemd#36781 (254 to 255, about one boot in five): a fresh scope is declared dead
            # while its process lives in the cgroup. Try again.
            cause = f"start job {result}, {unit} is {state}, the process is in {have or 'nothing'}"
            log.debug("%s", cause)
            await self._until_gone(unit, spec.model, end)
        raise UnitFailed(
            "start",
            target,
            f"systemd did not make its scope: {cause}",
            hint=f"`journalctl -u {unit}` and `journalctl _PID=1` may say why",
        )

    async def await_gone(self, unit: str, model: str, end: float) -> None:
        """Return when systemd knows no such unit; its processes are gone. DriverTimeout at ``end``
        (monotonic)."""
        target = f'model "{model}"'
        if not await self._bus.call("kill", target, lambda bus: bus.wait_unloaded(unit, end)):
            raise DriverTimeout(
                "kill",
                target,
                f"{unit} is empty but systemd keeps it loaded",
                hint=f"`systemctl status {unit}` shows what holds it",
            )

    async def clean(self, unit: str) -> None:
        """Clean up after a failed start; the first error is the one to raise."""

        def holder_lives(bus: Bus) -> bool:
            _, path = _state(bus, unit)
            return bool(path and cgroup.read_procs(self._root + path))

        with suppress(DriverError):
            # A scope of that name with processes in it is another's: that was the failure.
            if not await self._bus.call("start", unit, holder_lives):
                # Its start job may still wait: run later, it would make a scope without processes.
                await self._bus.call("start", unit, lambda bus: bus.stop_unit(unit))
                await self.await_gone(unit, unit, time.monotonic() + NAME_FREE_TIMEOUT)

    async def _until_gone(self, unit: str, model: str, end: float) -> None:
        await self.await_gone(unit, model, min(end, time.monotonic() + NAME_FREE_TIMEOUT))

    async def _is_ours(self, unit: str, target: str, launch: Launch, *, last: bool) -> bool:
        """A unit of that name is loaded. True: it holds our launcher, made by a call whose answer
        was lost with the connection. False: it is dead and not yet collected. Raises UnitFailed
        when it is alive, and not ours to take, or with ``last`` still there."""
        state, path = await self._look(unit, target)
        if path and (alive := cgroup.read_procs(self._root + path)):
            if launch.process.pid in alive:
                return True
            raise UnitFailed(
                "start",
                target,
                f"{unit} exists already with {len(alive)} processes in it",
                hint=f"`systemctl stop {unit}` ends them",
            )
        if last:
            raise UnitFailed("start", target, f"{unit} is still loaded ({state})")
        return False

    async def _look(self, unit: str, target: str) -> tuple[str, str]:
        return await self._bus.call("start", target, lambda bus: _state(bus, unit))


def not_kept(target: str, unit: str, said: str, run: os.statvfs_result) -> UnitFailed:
    """systemd says "not found" of the unit that it was told to start; the reason is the disk."""
    if run.f_bavail * run.f_frsize < _FULL_BYTES or (run.f_files and not run.f_favail):
        cause = f"{RUN} is full, and systemd keeps the scope's file there ({said})"
    else:
        cause = f"systemd could not write {unit} into {RUN}/systemd/transient: {said}"
    return UnitFailed("start", target, cause, hint=f"`df -h {RUN}` and `df -i {RUN}` show its room")


def _state(bus: Bus, unit: str) -> tuple[str, str]:
    """ActiveState ("gone" when it is not loaded) and cgroup."""
    found = bus.find(unit)
    return (found.active, bus.control_group(found)) if found else ("gone", "")


def _properties(spec: LaunchSpec, pid: int) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "Description": f"llmux engine for {spec.model}",
        "Slice": SLICE,
        "PIDs": [pid],
        "Delegate": True,  # the sub-cgroup engine/ is ours to make and to freeze
        "CollectMode": "inactive-or-failed",  # the name must be free again at once
        "KillMode": "control-group",
        # At shutdown the services stop first, and drain. By way of a target that is started once:
        # ordered with the services themselves, a start would wait for a gateway's stop.
        "Before": ["llmux-engines.target"],
        "TimeoutStopUSec": int(STOP_TIMEOUT * 1e6),
    }
    for name, value in spec.properties.items():
        if name.encode() not in KNOWN_UNIT_SIGNATURES:
            raise UnitFailed(
                "start",
                f'model "{spec.model}"',
                f'"{name}" is not a property of a scope unit that llmux can set',
                hint="man systemd.resource-control lists them; use D-Bus names",
            )
        wanted[name] = _INFINITY if value == "infinity" else value
        try:
            signature_array({name: wanted[name]})
            if KNOWN_UNIT_SIGNATURES[name.encode()] in (b"t", b"u", b"i"):
                operator.index(wanted[name])
        except (TypeError, ValueError) as error:
            raise UnitFailed(
                "start", f'model "{spec.model}"', f"unit property {name}: {error}"
            ) from error
    return wanted
