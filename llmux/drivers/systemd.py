"""Engine units as transient systemd scopes, made over D-Bus with pystemd.

The child waits at a gate while systemd puts it into ``llmux-<model>.scope``; it goes through only
when the scope was *seen* to be active around it, so everything that it forks is born in the scope.
Scopes are in ``llmux.slice`` and tied to no service: they outlive a restart of the supervisor, and
``observe`` finds them again.

pystemd holds the GIL during its calls (no ``nogil`` in its source) and sd-bus waits up to 25 s. So:
one thread does all of it, only calls that PID 1 answers at once are made, their limit is
``BUS_TIMEOUT``, and every wait is a poll() on the bus's descriptor, which releases the GIL.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pystemd.dbusexc import DBusBaseError
from pystemd.dbuslib import DBus, apply_signature
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES, signature_array

from llmux.drivers import cgroup
from llmux.drivers.inotify import Inotify
from llmux.drivers.process import Process, find_root, start_ticks
from llmux.drivers.spawn import (
    Launch,
    model_of,
    prepare_runtime_dir,
    spawn_launcher,
    unit_name,
)
from llmux.errors import DriverError, DriverTimeout, UnitFailed
from llmux.ports import LaunchSpec, UnitHandle

log = logging.getLogger(__name__)

BUS_TIMEOUT: Final = 5.0  # seconds; PID 1 answers in under 1 ms unless it is reloading
SLICE: Final = "llmux.slice"
# A scope whose last process has gone is unloaded within milliseconds; after this we call it stuck.
NAME_FREE_TIMEOUT: Final = 3.0
SPARE_DELAY: Final = 1.0  # seconds after a start until the next launcher is made ready

_SYSTEMD = b"org.freedesktop.systemd1"
_ROOT = b"/org/freedesktop/systemd1"
_MANAGER = b"org.freedesktop.systemd1.Manager"
_UNIT = b"org.freedesktop.systemd1.Unit"
_SCOPE = b"org.freedesktop.systemd1.Scope"
_UNIT_EXISTS = b"org.freedesktop.systemd1.UnitExists"

# Not in pystemd's table up to 0.15.3 (systemd: dbus-scope.c, dbus-cgroup.c). Without an entry
# signature_array raises KeyError. Those that it has are left alone.
_MISSING_SIGNATURES: Final = {
    b"PIDs": b"au",
    b"CPUWeight": b"t",
    b"IOWeight": b"t",
    b"StartupCPUWeight": b"t",
    b"MemoryMin": b"t",
    b"MemoryZSwapMax": b"t",
    b"OOMPolicy": b"s",
    b"AllowedCPUs": b"ay",
    b"AllowedMemoryNodes": b"ay",
    b"DeviceAllow": b"a(ss)",
    b"ManagedOOMSwap": b"s",
    b"ManagedOOMMemoryPressure": b"s",
    b"ManagedOOMPreference": b"s",
    b"ManagedOOMMemoryPressureLimit": b"u",
}
for _name, _signature in _MISSING_SIGNATURES.items():
    KNOWN_UNIT_SIGNATURES.setdefault(_name, _signature)

_INFINITY = 2**64 - 1

_T = TypeVar("_T")


class _ConnectionLost(Exception):
    """The bus went away in the middle; the outcome of what was asked is unknown."""


class _UnitExists(Exception):
    """StartTransientUnit: a unit of that name is loaded."""


@dataclass(frozen=True, slots=True)
class _Unit:
    name: str
    load: str
    active: str
    path: bytes


def _lost(error: DBusBaseError) -> bool:
    # ENOTCONN, ECONNRESET, EPIPE, ESTALE, ECONNREFUSED; the number comes negative from sd-bus.
    return -error.errno in (107, 104, 32, 116, 111)


def _text(error: DBusBaseError) -> str:
    message = error.err_message or os.strerror(-error.errno)
    return message.decode(errors="replace") if isinstance(message, bytes) else str(message)


class _Bus:
    """One connection to PID 1. Used in the bus thread only; sd-bus objects belong to one thread."""

    def __init__(self) -> None:
        self._bus: Any = None

    def close(self) -> None:
        if self._bus is not None:
            bus, self._bus = self._bus, None
            bus.close()

    def call(self, method: bytes, signature: bytes = b"", *values: Any) -> Any:
        arguments = apply_signature(signature, list(values)) if signature else []
        return self._method(_SYSTEMD, _ROOT, _MANAGER, method, arguments)

    def start_transient(self, unit: str, properties: Mapping[str, Any], deadline: float) -> str:
        """Queue the start job and wait for its result ("done", "failed", "timeout", …)."""
        name = unit.encode()
        rules = self._match(b"JobRemoved", b"arg2", name)
        try:
            arguments = apply_signature(b"ss", [name, b"fail"]) + signature_array(dict(properties))
            arguments += [(ord(b"a"), b"(sa(sv))"), (-1, None)]  # no auxiliary units
            try:
                job = self._method(_SYSTEMD, _ROOT, _MANAGER, b"StartTransientUnit", arguments)
            except DBusBaseError as error:
                if error.err_name == _UNIT_EXISTS:
                    raise _UnitExists from None
                raise
            removed = self._signal(b"JobRemoved", lambda body: body[1] == job, deadline)
        finally:
            self._unmatch(rules)
        return removed[3].decode() if removed else "no answer"

    def wait_unloaded(self, unit: str, deadline: float) -> bool:
        """True once systemd knows no unit of that name. A failed one is reset on the way."""
        name = unit.encode()
        rules = self._match(b"UnitRemoved", b"arg0", name)
        try:
            while True:
                found = self.find(unit)
                if found is None:
                    return True
                if found.active == "failed":
                    with suppress(DBusBaseError):
                        self.call(b"ResetFailedUnit", b"s", name)
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                # In slices, should the signal have come before the match was in force.
                self._signal(
                    b"UnitRemoved",
                    lambda body: body[0] == name,
                    time.monotonic() + min(left, 0.25),
                )
        finally:
            self._unmatch(rules)

    def find(self, unit: str) -> _Unit | None:
        return next((found for found in self.list_units() if found.name == unit), None)

    def list_units(self) -> list[_Unit]:
        """Loaded llmux-*.scope units. ListUnits, not GetUnit: pystemd leaks on errors."""
        rows = self.call(b"ListUnitsByPatterns", b"asas", [], [b"llmux-*.scope"]) or []
        return [
            _Unit(row[0].decode(), row[2].decode(), row[3].decode(), row[6])
            for row in ([rows] if isinstance(rows, tuple) else rows)
            if row[2] != b"not-found"
        ]

    def control_group(self, unit: _Unit) -> str:
        try:
            value = self._connected().get_property(
                _SYSTEMD, unit.path, _SCOPE, b"ControlGroup", b"s"
            )
        except DBusBaseError as error:
            self._check(error)
            return ""
        return str(value.decode())

    def _connected(self) -> Any:
        if self._bus is None:
            # Read by sd-bus when a call is made; the default of 25 s would stop the whole process.
            os.environ.setdefault("SYSTEMD_BUS_TIMEOUT", f"{BUS_TIMEOUT:g}s")
            bus = DBus()
            bus.open()
            self._bus = bus
            # UnitRemoved is sent only while somebody is subscribed.
            self.call(b"Subscribe")
        return self._bus

    def _method(
        self, destination: bytes, path: bytes, interface: bytes, method: bytes, arguments: Any
    ) -> Any:
        try:
            return (
                self._connected().call_method(destination, path, interface, method, arguments).body
            )
        except DBusBaseError as error:
            self._check(error)
            raise

    def _check(self, error: DBusBaseError) -> None:
        if _lost(error):
            self.close()
            raise _ConnectionLost(_text(error)) from error

    def _daemon(self, method: bytes, rule: bytes) -> None:
        bus = b"org.freedesktop.DBus"
        arguments = apply_signature(b"s", [rule])
        self._method(bus, b"/org/freedesktop/DBus", bus, method, arguments)

    def _match(self, member: bytes, argument: bytes, value: bytes) -> bytes:
        # Only this unit's signals, and only while somebody waits: nobody reads the bus in between.
        escaped = value.replace(b"'", b"'\\''")
        rule = (
            b"type='signal',sender='org.freedesktop.systemd1',path='/org/freedesktop/systemd1',"
            b"interface='%s',member='%s',%s='%s'" % (_MANAGER, member, argument, escaped)
        )
        self._daemon(b"AddMatch", rule)
        return rule

    def _unmatch(self, rule: bytes) -> None:
        if self._bus is not None:
            with suppress(DBusBaseError, _ConnectionLost):
                self._daemon(b"RemoveMatch", rule)

    def _signal(
        self, member: bytes, want: Callable[[Any], bool], deadline: float
    ) -> tuple[Any, ...] | None:
        """The body of the first such signal, None at the deadline (monotonic).

        Read from process() itself, not by match_signal: its callbacks are kept without a reference.
        What arrived during a call is queued inside sd-bus, where poll() does not see it; hence
        process() first, and three empty answers, as one may stand for something done internally.
        """
        bus = self._connected()
        poller = select.poll()
        poller.register(bus.get_fd(), select.POLLIN)
        while True:
            empty = 0
            while empty < 3:
                try:
                    message = bus.process()
                except DBusBaseError as error:
                    self._check(error)
                    raise
                if message.is_empty():
                    empty += 1
                    continue
                empty = 0
                if message.is_signal(_MANAGER, member):
                    message.process_reply(False)
                    if want(message.body):
                        return tuple(message.body)
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            poller.poll(min(left, 0.1) * 1000)


class SystemdUnits:
    """UnitManager on transient scopes. Needs root, cgroup v2 and a systemd as PID 1.

    ``cgroup_root``: where cgroup2 is mounted. ``stop_timeout``: seconds that ``systemctl stop`` of
    a scope gives the engine before SIGKILL. ``spare``: hold one launcher ready at its gate, which
    takes the start of a Python interpreter, 15 to 40 ms, out of every start and restore.
    """

    def __init__(
        self,
        cgroup_root: str = "/sys/fs/cgroup",
        *,
        stop_timeout: float = 10.0,
        spare: bool = True,
    ) -> None:
        self._root = cgroup_root
        self._stop_timeout = stop_timeout
        self._want_spare = spare
        self._spare: Launch | None = None
        self._spare_timer: asyncio.TimerHandle | None = None
        self._bus = _Bus()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmux-bus")
        self._inotify: Inotify | None = None
        self._processes: dict[tuple[int, int], Process] = {}
        self._watched: dict[tuple[int, int], tuple[UnitHandle, Callable[[UnitHandle, str], None]]]
        self._watched = {}

    async def start(self, spec: LaunchSpec, deadline: float) -> UnitHandle:
        unit = unit_name(spec.model)
        prepare_runtime_dir(spec)
        end = time.monotonic() + deadline
        launch = self._take_launcher()
        pid, ticks = launch.process.pid, launch.process.ticks
        self._keep(launch.process)
        try:
            path = await self._make_scope(spec, unit, launch, end)
            handle = UnitHandle(spec.model, unit, pid, ticks, path)
            left = max(end - time.monotonic(), 0.001)
            await launch.open(spec, left, cgroup_root=self._root, guardian=False)
        except BaseException:
            # Closing the gate is enough for a launcher that waits at it; a kill for one beyond.
            launch.close()
            launch.process.signal(signal.SIGKILL)
            await asyncio.shield(self._clean(unit, launch))
            raise
        launch.close()
        return handle

    async def terminate(self, handle: UnitHandle, deadline: float) -> bool:
        assert handle.cgroup is not None
        # A frozen process keeps SIGTERM pending and never acts on it.
        with suppress(OSError):
            cgroup.write_freeze(cgroup.engine_directory(self._root, handle.cgroup), "0")
        process = self._processes.get((handle.pid, handle.start_ticks))
        opened = None
        if process is None or process.ended is not None:
            process = opened = Process.open(handle.pid, handle.start_ticks)
        end = time.monotonic() + deadline
        try:
            if process is not None:
                process.signal(signal.SIGTERM)
            directory = self._root + handle.cgroup
            empty = await cgroup.wait_events(self._events, directory, "populated", 0, deadline)
            if empty and process is not None:
                # The cgroup counts no zombies; ours must be reaped before its pid can be restored.
                await process.wait(max(end - time.monotonic(), 0.001))
            return empty
        finally:
            if opened is not None:
                opened.close()

    async def kill(self, handle: UnitHandle, deadline: float) -> None:
        assert handle.cgroup is not None
        directory = self._root + handle.cgroup
        end = time.monotonic() + deadline
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
        await self._await_name(handle.unit, handle.model, end)
        process = self._processes.get((handle.pid, handle.start_ticks))
        if process is not None and await process.wait(max(end - time.monotonic(), 0.001)):
            self._processes.pop((handle.pid, handle.start_ticks), None)

    async def observe(self) -> Sequence[UnitHandle]:
        def look() -> list[tuple[str, str]]:
            return [(unit.name, self._bus.control_group(unit)) for unit in self._bus.list_units()]

        handles = []
        for unit, path in await self._call("observe", "the engine units", look):
            if f"/{SLICE}/" not in f"{path}/":
                continue  # somebody else's scope of that name, or one that has just ended
            directory = self._root + path
            pid = find_root(cgroup.read_procs(f"{directory}/{cgroup.ENGINE}"))
            if pid is None:
                pid = find_root(cgroup.read_procs(directory))
            if pid is not None and (ticks := start_ticks(pid)) is not None:
                handles.append(UnitHandle(model_of(unit), unit, pid, ticks, path))
        return handles

    async def ending(self) -> bool:
        """Has our slice a stop job? At shutdown it has one, too."""

        def look() -> Any:
            return self._bus.call(b"ListUnitsByPatterns", b"asas", [], [SLICE.encode()]) or []

        rows = await self._call("look at", SLICE, look)
        rows = [rows] if isinstance(rows, tuple) else rows
        return any(row[7] and row[8] == b"stop" for row in rows)  # id and type of its job

    async def pids(self, handle: UnitHandle) -> Sequence[int]:
        assert handle.cgroup is not None
        return cgroup.read_procs(self._root + handle.cgroup)

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        key = (handle.pid, handle.start_ticks)
        self._watched[key] = (handle, on_exit)
        process = self._processes.get(key) or Process.open(*key)
        if process is None:
            asyncio.get_running_loop().call_soon(self._ended, key, "gone")
            return
        self._processes[key] = process
        process.on_end(lambda ended: self._ended(key, ended.ended or "gone"))

    def unwatch(self, handle: UnitHandle) -> None:
        self._watched.pop((handle.pid, handle.start_ticks), None)

    async def close(self) -> None:
        self._watched.clear()
        if self._spare_timer is not None:
            self._spare_timer.cancel()
        if self._spare is not None:
            self._spare.close()
            await self._spare.process.wait(1.0)
            self._spare.process.close()
            self._spare = None
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        loop = asyncio.get_running_loop()
        with suppress(RuntimeError):  # closed twice
            await loop.run_in_executor(self._thread, self._bus.close)
        self._thread.shutdown(wait=False)

    @property
    def _events(self) -> Inotify:
        if self._inotify is None:
            self._inotify = Inotify()
        return self._inotify

    def _take_launcher(self) -> Launch:
        spare, self._spare = self._spare, None
        if self._want_spare and self._spare_timer is None:
            # Not at once: the engine that starts now can use the CPU better.
            loop = asyncio.get_running_loop()
            self._spare_timer = loop.call_later(SPARE_DELAY, self._make_spare)
        if spare is not None:
            if spare.process.ended is None:
                return spare
            spare.close()
        return spawn_launcher()

    def _make_spare(self) -> None:
        self._spare_timer = None
        if self._spare is None:
            with suppress(UnitFailed):
                self._spare = spawn_launcher()

    def _keep(self, process: Process) -> None:
        # Ended ones are kept until their unit is killed, so that a late watch still learns how.
        self._processes[process.pid, process.ticks] = process

    def _ended(self, key: tuple[int, int], description: str) -> None:
        self._processes.pop(key, None)
        if (entry := self._watched.pop(key, None)) is not None:
            handle, on_exit = entry
            on_exit(handle, description)

    async def _call(self, operation: str, target: str, function: Callable[[], _T]) -> _T:
        """Run in the bus thread. A connection found dead (PID 1 or the bus daemon was restarted) is
        replaced and the call repeated once; so ``function`` must bear being run twice."""
        loop = asyncio.get_running_loop()
        try:
            try:
                return await loop.run_in_executor(self._thread, function)
            except _ConnectionLost:
                log.debug("connection to the system bus lost; reconnecting")
                return await loop.run_in_executor(self._thread, function)
        except (_ConnectionLost, DBusBaseError) as error:
            text = _text(error) if isinstance(error, DBusBaseError) else str(error)
            raise DriverError(
                operation,
                target,
                f"systemd did not answer over D-Bus: {text}",
                hint="is systemd PID 1 here and dbus running? `busctl status` shows it",
            ) from error

    def _properties(self, spec: LaunchSpec, pid: int) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "Description": f"llmux engine for {spec.model}",
            "Slice": SLICE,
            "PIDs": [pid],
            "Delegate": True,  # the sub-cgroup engine/ is ours to make and to freeze
            "CollectMode": "inactive-or-failed",  # the name must be free again at once
            "KillMode": "control-group",
            # At shutdown the services stop first, and drain; `Before=` turns the start order round.
            "Before": ["llmux.service", "llmux-gateway.service"],
            "TimeoutStopUSec": int(self._stop_timeout * 1e6),
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

    async def _make_scope(self, spec: LaunchSpec, unit: str, launch: Launch, end: float) -> str:
        """The cgroup of a new scope that was seen to hold the launcher. Raises UnitFailed."""
        properties = self._properties(spec, launch.process.pid)
        target = f'model "{spec.model}"'

        def create() -> str:
            return self._bus.start_transient(unit, properties, end)

        def look() -> tuple[str, str]:
            found = self._bus.find(unit)
            return (found.active, self._bus.control_group(found)) if found else ("gone", "")

        cause = ""
        for attempt in (1, 2):
            try:
                result = await self._call("start", target, create)
            except _UnitExists:
                # Dead and not yet collected, or alive: then it is not ours to take.
                state, path = await self._call("start", target, look)
                if path and (alive := cgroup.read_procs(self._root + path)):
                    if launch.process.pid not in alive:
                        raise UnitFailed(
                            "start",
                            target,
                            f"{unit} exists already with {len(alive)} processes in it",
                            hint=f"`systemctl stop {unit}` ends them",
                        ) from None
                    # Our own, made by a call whose answer was lost with the connection.
                    result = "done"
                elif attempt == 1:
                    limit = min(end, time.monotonic() + NAME_FREE_TIMEOUT)
                    await self._await_name(unit, spec.model, limit)
                    continue
                else:
                    raise UnitFailed("start", target, f"{unit} is still loaded ({state})") from None
            if launch.process.ended is not None:
                raise UnitFailed(
                    "start", target, f"its launcher ended early: {launch.process.ended}"
                )
            if result == "no answer":
                raise DriverTimeout("start", target, f"no result for the start job of {unit}")
            state, path = await self._call("start", target, look)
            have = cgroup.cgroup_of(launch.process.pid)
            if state == "active" and path and have == path:
                return path
            # systemd#36781 (254 to 255, about one boot in five): a fresh scope is declared dead
            # while its process lives on in the cgroup. Once more, then.
            cause = f"start job {result}, {unit} is {state}, the process is in {have or 'nothing'}"
            log.debug("%s", cause)
            await self._await_name(unit, spec.model, min(end, time.monotonic() + NAME_FREE_TIMEOUT))
        raise UnitFailed(
            "start",
            target,
            f"systemd did not make its scope: {cause}",
            hint=f"`journalctl -u {unit}` and `journalctl _PID=1` may say why",
        )

    async def _await_name(self, unit: str, model: str, end: float) -> None:
        def wait() -> bool:
            return self._bus.wait_unloaded(unit, end)

        if not await self._call("kill", f'model "{model}"', wait):
            raise DriverTimeout(
                "kill",
                f'model "{model}"',
                f"{unit} is empty but systemd keeps it loaded",
                hint=f"`systemctl status {unit}` shows what holds it",
            )

    async def _clean(self, unit: str, launch: Launch) -> None:
        """After a failed start: nothing may be left, and the first error is the one to tell."""
        if not await launch.process.wait(2.0):
            log.warning("the launcher of %s (pid %d) does not die", unit, launch.process.pid)
            return
        self._processes.pop((launch.process.pid, launch.process.ticks), None)

        def holder_lives() -> bool:
            found = self._bus.find(unit)
            path = self._bus.control_group(found) if found else ""
            return bool(path and cgroup.read_procs(self._root + path))

        with suppress(DriverError):
            # A scope of that name with processes in it is another's: that was the failure.
            if not await self._call("start", unit, holder_lives):
                await self._await_name(unit, unit, time.monotonic() + NAME_FREE_TIMEOUT)
