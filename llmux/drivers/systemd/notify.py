"""sd_notify(3), on the sdnotify package, with what that leaves out.

sdnotify encodes as latin-1 and swallows the error, READY=1 included, when a STATUS holds anything
else. UTF-8 bytes read as latin-1 go through it unchanged. File descriptors go over its socket
directly.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import sdnotify

_FIRST_FD: Final = 3  # sd_listen_fds(3)


class SdNotifier:
    """Notifier on $NOTIFY_SOCKET; does nothing where there is none."""

    def __init__(self) -> None:
        # Built only with a socket to talk to: its constructor leaks one otherwise.
        self._sd: Any = sdnotify.SystemdNotifier() if os.environ.get("NOTIFY_SOCKET") else None
        if self._sd is not None and self._sd.socket is None:
            self._sd = None
        if self._sd is not None:
            # A manager that reads nothing must not hold the event loop up. sdnotify swallows the
            # error, so a message is lost then; systemd's own buffer takes hundreds.
            self._sd.socket.setblocking(False)

    @property
    def active(self) -> bool:
        return self._sd is not None

    def ready(self) -> None:
        self._send("READY=1")

    def status(self, text: str) -> None:
        self._send(f"STATUS={' '.join(text.split())}")

    def reloading(self) -> None:
        # Type=notify-reload wants the time; others ignore it. Followed by ready() when done.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def store_fds(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Put sockets into the fd store; they come back by ``listen_fds`` after a restart.

        Needs FileDescriptorStoreMax= in the unit. systemd drops duplicates by itself.
        """
        if self._sd is not None and sockets:
            with suppress(OSError):
                socket.send_fds(
                    self._sd.socket,
                    [f"FDSTORE=1\nFDNAME={name}".encode()],
                    [sock.fileno() for sock in sockets],
                )

    def drop_fds(self, name: str) -> None:
        """Take what is stored under a name out of the fd store."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def close(self) -> None:
        if self._sd is not None:
            self._sd.socket.close()
            self._sd = None

    def _send(self, state: str) -> None:
        if self._sd is not None:
            self._sd.notify(state.encode().decode("latin-1"))


def listen_fds(first: int = _FIRST_FD) -> dict[str, list[socket.socket]]:
    """Sockets that systemd passed (socket activation or fd store), by name; taken once.

    Empty when $LISTEN_PID names another process. Descriptors that are no sockets are closed.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.get("LISTEN_FDS", "0") or 0)
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(variable, None)  # not for our children
    found: dict[str, list[socket.socket]] = {}
    for index in range(count):
        fd = first + index
        os.set_inheritable(fd, False)
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            continue
        name = names[index] if index < len(names) and names[index] else "unknown"
        found.setdefault(name, []).append(sock)
    return found


def watchdog_interval() -> float | None:
    """Seconds between pings that keep systemd content (half of what it allows), None without
    one."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        allowed = int(os.environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return allowed / 2e6 if allowed > 0 else None
