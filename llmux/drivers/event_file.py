"""The latest events as a file of one JSON object per line.

Two files of a bounded size: when the present one is full it becomes the former one, whose place it
takes. It belongs on a tmpfs (/run): the event loop writes it, and on a disk a write can wait for
seconds while an image of an engine is being written.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from llmux import typed_json
from llmux.errors import StateFileError
from llmux.small_files import read_small
from llmux.typed_json import BadJson

log = logging.getLogger(__name__)

MAX_EVENT: Final = 64 * 1024  # one is some 300 bytes
MAX_BYTES: Final = 4 * 1024 * 1024  # of each of the two; some 14,000 events


class EventFile:
    """EventStore at ``path`` and ``path``.former. 0600: reasons quote engines' output."""

    def __init__(self, path: str, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._former = f"{path}.former"
        self._max_bytes = max_bytes
        self._file: int | None = None
        self._size = 0

    def load(self) -> Sequence[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        problem: OSError | None = None
        for path in (self._former, self._path):
            try:
                lines = read_small(path, self._max_bytes + 1).split(b"\n")
            except FileNotFoundError:
                continue
            except OSError as error:
                problem = error
                continue
            events = [event for event in map(_event, filter(None, lines)) if event is not None]
            if damaged := sum(map(bool, lines)) - len(events):
                log.warning("%d damaged lines of the events file %s are left out", damaged, path)
            found += events
        if problem is not None and not found:
            raise self._error("read", problem) from problem
        return found

    def append(self, event: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
            if self._file is not None and self._size + len(line) > self._max_bytes:
                self._turn()
            if self._file is None:
                self._open()
            assert self._file is not None
            written = os.write(self._file, line)
            self._size += written
            if written < len(line):  # the next event must not continue this line
                self._close()
                raise OSError(errno.ENOSPC, "no room")
        except (OSError, TypeError, ValueError) as error:
            self._close()
            raise self._error("write", error) from error

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._file = os.open(self._path, flags, 0o600)
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        self._size = found.st_size
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._size += os.write(self._file, b"\n")  # its writer was interrupted
        if self._size > self._max_bytes:
            self._turn()
            self._open()

    def _turn(self) -> None:
        self._close()
        os.replace(self._path, self._former)

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
            self._file = None

    def _error(self, verb: str, error: Exception) -> StateFileError:
        cause = getattr(error, "strerror", None) or str(error)
        return StateFileError(
            f"cannot {verb} the events file {self._path}: {cause}",
            hint="only the timeline of before a restart depends on it",
        )


def _event(line: bytes) -> Mapping[str, Any] | None:
    if len(line) > MAX_EVENT:
        return None
    try:
        event = typed_json.parse(line)
    except BadJson:
        return None
    return event if isinstance(event, dict) else None
