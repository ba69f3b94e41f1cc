"""The journal's native protocol, and logging over it. No dependency, never blocks.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a datagram of ``KEY=value`` lines, or of ``KEY``, the
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
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final, TextIO

SOCKET_PATH: Final = "/run/systemd/journal/socket"
_SO_SNDBUFFORCE: Final = 32  # <asm-generic/socket.h>; not in Python's socket module
_SEND_BUFFER: Final = 8 * 1024 * 1024

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

    def send(self, fields: Iterable[tuple[str, str]]) -> bool:
        """False when the entry was dropped: no journal, or one that does not keep up."""
        data = encode(fields)
        try:
            # Addressed anew each time rather than connected: journald may be restarted.
            self._open().sendto(data, self._path)
        except OSError as error:
            if error.errno in (errno.EMSGSIZE, errno.ENOBUFS):
                return self._send_memfd(data)
            self.dropped += 1
            return False
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
    """Log records as journal entries; only the fields in ``FIELDS`` go along."""

    def __init__(self, journal: Journal | None = None, identifier: str = "llmux") -> None:
        super().__init__()
        self._journal = journal or Journal()
        self._identifier = identifier

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
        self._journal.send(fields)

    def close(self) -> None:
        self._journal.close()
        super().close()


class TextFormatter(logging.Formatter):
    """For readers of text, who see no fields: the request's id after the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        text = super().formatMessage(record)
        request = record.__dict__.get("request")
        return f"{text} [request {request}]" if request else text


class PrefixFormatter(TextFormatter):
    """``<N>`` before every line, as sd-daemon(3) has it: for a stderr that somebody else
    collects."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{priority_of(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


def stderr_is_journal(stream: TextIO | None = None) -> bool:
    """Does $JOURNAL_STREAM (device:inode) name our stderr? Inherited ones name somebody else's."""
    wanted = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat((stream or sys.stderr).fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return wanted == f"{status.st_dev}:{status.st_ino}"


def setup_logging(verbose: bool = False) -> None:
    """One handler on the root logger: the journal when stderr goes there, else stderr."""
    handler: logging.Handler
    journal = Journal()
    if stderr_is_journal() and journal.present:
        handler = JournalHandler(journal)
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
