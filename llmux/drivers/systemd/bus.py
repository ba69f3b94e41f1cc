"""One connection to systemd over D-Bus, and the one thread that may use it.

pystemd never releases the GIL during its calls, and sd-bus waits up to 25 s. So: one thread does
all of it, only calls that PID 1 answers at once are made, their limit is ``BUS_TIMEOUT``, and
every wait is a poll() on the bus's descriptor, which releases the GIL. Knows units and jobs;
never what they are for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from llmux.drivers.systemd.bindings import (
    KNOWN_UNIT_SIGNATURES,
    DBus,
    DBusBaseError,
    apply_signature,
    signature_array,
)
from llmux.errors import DriverError

log = logging.getLogger(__name__)

BUS_TIMEOUT: Final = 5.0  # seconds; PID 1 answers in under 1 ms unless it is reloading

_SYSTEMD = b"org.freedesktop.systemd1"
_ROOT = b"/org/freedesktop/systemd1"
_MANAGER = b"org.freedesktop.systemd1.Manager"
_SCOPE = b"org.freedesktop.systemd1.Scope"
_SERVICE = b"org.freedesktop.systemd1.Service"
_UNIT_EXISTS = b"org.freedesktop.systemd1.UnitExists"
# pystemd has classes for some errors, which then have no name: not in every version for the same.
NO_SUCH_UNIT = ("NoSuchUnit", "DBusNoSuchUnitError")

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

_T = TypeVar("_T")


class ConnectionLost(Exception):
    """The bus went away in the middle; the outcome of what was asked is unknown."""


class UnitExists(Exception):
    """StartTransientUnit: a unit of that name is loaded."""


class UnitNotKept(Exception):
    """StartTransientUnit: systemd could not write down what the unit is, or not read it again."""


@dataclass(frozen=True, slots=True)
class Unit:
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


def kind_of(error: DBusBaseError) -> str:
    name = error.err_name
    text = name.decode() if isinstance(name, bytes) else str(name)
    return text.rpartition(".")[2] or type(error).__name__


class Bus:
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
                    raise UnitExists from None
                if kind_of(error) in NO_SUCH_UNIT:  # its word for that: "Unit … not found."
                    raise UnitNotKept(_text(error)) from None
                raise
            removed = self._signal(b"JobRemoved", lambda body: body[1] == job, deadline)
        finally:
            self._unmatch(rules)
        return removed[3].decode() if removed else "no answer"

    def stop_unit(self, unit: str) -> None:
        """Queue a stop job, which cancels a start job that waits. Not loaded is fine."""
        with suppress(DBusBaseError):
            self.call(b"StopUnit", b"ss", unit.encode(), b"replace")

    def restart_unit(self, unit: str) -> None:
        """Queue a restart job, and do not wait for it."""
        self.call(b"RestartUnit", b"ss", unit.encode(), b"replace")

    def wait_unloaded(self, unit: str, deadline: float) -> bool:
        """True once systemd knows no unit of that name. A failed one is reset on the way; one that
        systemd keeps active without processes is stopped."""
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
                gone = self._signal(
                    b"UnitRemoved",
                    lambda body: body[0] == name,
                    time.monotonic() + min(left, 0.25),
                )
                if gone is None:
                    self.stop_unit(unit)
        finally:
            self._unmatch(rules)

    def find(self, unit: str) -> Unit | None:
        return next((found for found in self.list_units() if found.name == unit), None)

    def list_units(self) -> list[Unit]:
        """Loaded llmux-*.scope units."""
        return [
            Unit(row[0].decode(), row[2].decode(), row[3].decode(), row[6])
            for row in self._rows(b"llmux-*.scope")
            if row[2] != b"not-found"
        ]

    def has_stop_job(self, unit: str) -> bool:
        # Of a row, 7 and 8 are the id and the type of the unit's job.
        return any(row[7] and row[8] == b"stop" for row in self._rows(unit.encode()))

    def service_end(self, unit: str) -> tuple[str, str]:
        """The type of a service's job ("" for none) and its KillMode."""
        rows = self._rows(unit.encode())
        if not rows:
            return "", ""
        row = rows[0]
        mode = self._connected().get_property(_SYSTEMD, row[6], _SERVICE, b"KillMode", b"s")
        return (row[8].decode() if row[7] else ""), str(mode.decode())

    def _rows(self, pattern: bytes) -> list[tuple[Any, ...]]:
        """ListUnits, not GetUnit: pystemd leaks on errors."""
        rows = self.call(b"ListUnitsByPatterns", b"asas", [], [pattern]) or []
        return [rows] if isinstance(rows, tuple) else rows

    def service_environment(self, unit: str) -> dict[str, str]:
        """The variables that ``Environment=`` of a service sets, drop-ins included; the service
        need not run."""
        path = self.call(b"LoadUnit", b"s", unit.encode())
        try:
            found = self._connected().get_property(_SYSTEMD, path, _SERVICE, b"Environment", b"as")
        except DBusBaseError as error:
            self._check(error)
            raise
        pairs = (os.fsdecode(entry).partition("=") for entry in found)
        return {name: value for name, _, value in pairs}

    def control_group(self, unit: Unit) -> str:
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
            # UnitRemoved is sent only to subscribers.
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
            raise ConnectionLost(_text(error)) from error

    def _daemon(self, method: bytes, rule: bytes) -> None:
        bus = b"org.freedesktop.DBus"
        arguments = apply_signature(b"s", [rule])
        self._method(bus, b"/org/freedesktop/DBus", bus, method, arguments)

    def _match(self, member: bytes, argument: bytes, value: bytes) -> bytes:
        # Only this unit's signals, and only during the wait: the bus is not read in between.
        escaped = value.replace(b"'", b"'\\''")
        rule = (
            b"type='signal',sender='org.freedesktop.systemd1',path='/org/freedesktop/systemd1',"
            b"interface='%s',member='%s',%s='%s'" % (_MANAGER, member, argument, escaped)
        )
        self._daemon(b"AddMatch", rule)
        return rule

    def _unmatch(self, rule: bytes) -> None:
        if self._bus is not None:
            with suppress(DBusBaseError, ConnectionLost):
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


def service_environment(unit: str) -> dict[str, str]:
    """``Bus.service_environment`` on a connection of its own. Blocks for BUS_TIMEOUT at most."""
    bus = Bus()
    try:
        return bus.service_environment(unit)
    except (ConnectionLost, DBusBaseError) as error:
        text = _text(error) if isinstance(error, DBusBaseError) else str(error)
        raise DriverError("read the environment of", unit, text) from error
    finally:
        bus.close()


class BusThread:
    """The bus from the event loop: each call in the one thread that owns the connection."""

    def __init__(self) -> None:
        self._bus = Bus()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmux-bus")

    async def call(self, operation: str, target: str, function: Callable[[Bus], _T]) -> _T:
        """What ``function`` makes of the bus. Raises DriverError when systemd does not answer.

        A connection found dead (PID 1 or the bus daemon was restarted) is replaced and the call
        repeated once; so ``function`` must bear being run twice.
        """
        loop = asyncio.get_running_loop()
        try:
            try:
                return await loop.run_in_executor(self._thread, function, self._bus)
            except ConnectionLost:
                log.debug("connection to the system bus lost; reconnecting")
                return await loop.run_in_executor(self._thread, function, self._bus)
        except (ConnectionLost, DBusBaseError) as error:
            text = _text(error) if isinstance(error, DBusBaseError) else str(error)
            raise DriverError(
                operation,
                target,
                f"systemd did not answer over D-Bus: {text}",
                hint="is systemd PID 1 here and dbus running? `busctl status` shows it",
            ) from error

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(RuntimeError):  # closed twice
            await loop.run_in_executor(self._thread, self._bus.close)
        self._thread.shutdown(wait=False)
