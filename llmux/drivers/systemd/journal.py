"""The journal's native protocol, and logging over it. No dependency, never blocks.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a datagram of ``KEY=value`` lines, or of the key, the
length as 64 bits little-endian, and the value, when that holds a newline. One too big for a
datagram goes as a sealed memfd.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import sys
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Final, TextIO

SOCKET_PATH: Final = "/run/systemd/journal/socket"
_SO_SNDBUFFORCE: Final = 32  # <asm-generic/socket.h>; not in Python's socket module
_SCM_CREDENTIALS: Final = 2  # <linux/socket.h>; not in Python's socket module
_SEND_BUFFER: Final = 8 * 1024 * 1024
KEPT_RECORDS: Final = 1000  # while the journal takes none; then the oldest go
RETRY_SECS: Final = 0.2

# What a record may carry besides its text: `extra={"model": …}`. Nothing else ever leaves, so no
# prompt, token or key can slip into the journal by an attribute's name.
FIELDS: Final[Mapping[str, str]] = {
    "model": "LLMUX_MODEL",
    "unit": "LLMUX_UNIT",
    "request": "LLMUX_REQUEST",
    "from": "LLMUX_FROM",
    "to": "LLMUX_TO",
    "effect": "LLMUX_EFFECT",
    "duration_ms": "LLMUX_DURATION_MS",
    "reason": "LLMUX_REASON",
    "deadline_ms": "LLMUX_DEADLINE_MS",
    "arrivals": "LLMUX_ARRIVALS",
    "message_id": "MESSAGE_ID",
}


def priority_of(level: int) -> int:
    """syslog's priority for a level of the logging module."""
    for at_least, priority in ((50, 2), (40, 3), (30, 4), (20, 6)):
        if level >= at_least:
            return priority
    return 7


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """One entry in the wire format."""
    out = bytearray()
    for key, value in fields:
        data = value.encode("utf-8", "replace")
        if b"\n" in data:
            out += key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            out += key.encode() + b"=" + data + b"\n"
    return bytes(out)


class Journal:
    """A socket to journald. ``dropped`` counts entries that it did not take at once."""

    def __init__(self, path: str = SOCKET_PATH) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self.dropped = 0

    @property
    def present(self) -> bool:
        return os.path.exists(self._path)

    def send(self, fields: Iterable[tuple[str, str]], pid: int | None = None) -> bool:
        """False when the entry was dropped: no journal, or one that does not keep up. ``pid``: the
        process that it is said for, whose unit journald then finds; ours when that one is gone, or
        when we may not speak for others."""
        data = encode(fields)
        try:
            if pid is None or not self._send_for(pid, data):
                # sendto rather than connect: journald may be restarted.
                self._open().sendto(data, self._path)
        except OSError as error:
            if error.errno in (errno.EMSGSIZE, errno.ENOBUFS):
                return self._send_memfd(data)
            self.dropped += 1
            return False
        return True

    def _send_for(self, pid: int, data: bytes) -> bool:
        """As root of the other process (unix(7), SCM_CREDENTIALS)."""
        root = (socket.SOL_SOCKET, _SCM_CREDENTIALS, struct.pack("3i", pid, 0, 0))
        try:
            self._open().sendmsg([data], [root], 0, self._path)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EPERM, errno.EINVAL):
                return False
            raise
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
                with suppress(OSError):  # the first needs CAP_NET_ADMIN
                    self._socket.setsockopt(socket.SOL_SOCKET, option, _SEND_BUFFER)
                    break
        return self._socket

    def _send_memfd(self, data: bytes) -> bool:
        try:
            fd = os.memfd_create("llmux-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.write(fd, data)
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
                # Not socket.send_fds: that ignores flags and address up to Python 3.13
                # (cpython#107898).
                self._open().sendmsg([b""], rights, 0, self._path)
            finally:
                os.close(fd)
        except OSError:
            self.dropped += 1
            return False
        return True


class JournalHandler(logging.Handler):
    """Log records as journal entries; only the fields in ``FIELDS`` go along.

    What a full, restarting or absent journal does not take is kept, and sent again in order by a
    thread."""

    def __init__(self, journal: Journal | None = None, identifier: str = "llmux") -> None:
        super().__init__()
        self._journal = journal or Journal()
        self._identifier = identifier
        self._late: deque[list[tuple[str, str]]] = deque(maxlen=KEPT_RECORDS)
        self._timer: threading.Timer | None = None
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """What is late is the parent's to send, and its thread is not here."""
        self._late.clear()
        self._timer = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            fields = [
                ("MESSAGE", message),
                ("PRIORITY", str(priority_of(record.levelno))),
                ("SYSLOG_IDENTIFIER", self._identifier),
                ("LOGGER", record.name),
            ]
            for name, key in FIELDS.items():
                value = record.__dict__.get(name)
                if value is not None:
                    fields.append((key, str(value)))
        except Exception:  # noqa: BLE001  # a bad record must not break its caller
            self.handleError(record)
            return
        self._late.append(fields)
        self._send_late()

    def _send_late(self) -> None:
        """With the handler's lock held."""
        while self._late and self._journal.send(self._late[0]):
            self._late.popleft()
        if self._late and self._timer is None:
            self._timer = threading.Timer(RETRY_SECS, self._retry)
            self._timer.daemon = True
            self._timer.start()

    def _retry(self) -> None:
        with self.lock or nullcontext():
            self._timer = None
            self._send_late()

    def close(self) -> None:
        with self.lock or nullcontext():
            if self._timer is not None:
                self._timer.cancel()
            self._journal.close()
        super().close()


class TextFormatter(logging.Formatter):
    """The request's id after the message: plain text shows no fields."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        text = super().formatMessage(record)
        request = record.__dict__.get("request")
        return f"{text} [request {request}]" if request else text


class PrefixFormatter(TextFormatter):
    """``<N>`` before every line, as sd-daemon(3) has it: for a stderr that another program
    collects."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{priority_of(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


def stderr_is_journal(stream: TextIO | None = None) -> bool:
    """Does $JOURNAL_STREAM (device:inode) name our stderr? An inherited one may name another's."""
    wanted = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat((stream or sys.stderr).fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return wanted == f"{status.st_dev}:{status.st_ino}"


def stderr_is_lost(stream: TextIO | None = None, pid: int | None = None) -> bool:
    """Are we a unit's process whose stderr is /dev/null? systemd starts it so while there is no
    journal, which may come back."""
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid() if pid is None else pid):
        return False
    try:
        return os.path.samestat(os.fstat((stream or sys.stderr).fileno()), os.stat(os.devnull))
    except (OSError, ValueError, AttributeError):
        return False


def setup_logging(verbose: bool = False) -> None:
    """One handler on the root logger: the journal when stderr goes there, else stderr."""
    handler: logging.Handler
    if stderr_is_journal() or stderr_is_lost():
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        if sys.stderr.isatty():
            handler.setFormatter(
                TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
            )
        else:
            handler.setFormatter(PrefixFormatter("%(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("llmux").setLevel(logging.DEBUG if verbose else logging.INFO)
