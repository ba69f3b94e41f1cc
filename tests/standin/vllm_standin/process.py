"""What every process of the tree does: log, have a name, end on SIGTERM, talk over a socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .faults import Faults


def log(who: str, text: str, level: str = "INFO") -> None:
    """Lines such as vLLM writes, to stderr, each in one write so that lines never mix."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    prefix = f"({who} pid={os.getpid()}) {level} {stamp} [standin] "
    raw("".join(f"{prefix}{line}\n" for line in text.splitlines()))


def raw(text: str) -> None:
    with suppress(OSError):  # the reader is gone: no reason to stop serving
        os.write(2, text.encode())


def set_name(name: str) -> None:
    """The name `ps` and /proc/PID/comm show; the kernel keeps 15 characters."""
    with open("/proc/self/comm", "w", encoding="utf-8") as comm:
        comm.write(name[:15])


def exit_on_sigterm(faults: Faults, before: Callable[[], None] = lambda: None) -> None:
    """SIGTERM and SIGINT end the process at once, unless the fault of refusing is ordered."""

    def handle(_number: int, _frame: object) -> None:
        if faults.get("ignore_sigterm"):
            return
        # once is enough: the unit manager and our parent may both send it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        before()
        os._exit(0)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


class Channel:
    """One JSON object per line over a socket, for the processes that have no event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._ready: list[dict[str, Any]] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, message: dict[str, Any]) -> None:
        """A peer that is gone is noticed by the next read, not here."""
        with suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message; None: the peer is gone."""
        while not self._ready:
            if not self._fill():
                return None
        return self._ready.pop(0)

    def receive_all(self) -> list[dict[str, Any]] | None:
        """What there is, when the socket is known to be readable; None: the peer is gone."""
        if not self._ready and not self._fill():
            return None
        messages, self._ready = self._ready, []
        return messages

    def _fill(self) -> bool:
        try:
            data = self._sock.recv(1 << 16)
        except OSError:
            return False
        if not data:
            return False
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        self._ready += [json.loads(line) for line in lines]
        return True
