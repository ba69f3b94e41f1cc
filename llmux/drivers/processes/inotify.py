"""inotify in the event loop, by ctypes: the standard library has no binding.

Used where waiting would otherwise be polling: cgroup.events, an engine's socket, its output files.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag


class Mask(IntFlag):
    """<sys/inotify.h>"""

    MODIFY = 0x2
    ATTRIB = 0x4
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE_SELF = 0x400
    IGNORED = 0x8000
    Q_OVERFLOW = 0x4000


_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_MASK_ADD = 0x20000000  # a second watch of the same inode adds to the first


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """One holder's interest in one inode; the kernel knows only one number per inode."""

    number: int
    mask: Mask
    callback: Callable[[Mask, str], None]


class Inotify:
    """A set of watches, each with a callback ``(mask, name)`` that runs in the loop."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_init1: {os.strerror(number)}")
        self._watches: dict[int, list[Watch]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._drain)

    def watch(self, path: str, mask: Mask, callback: Callable[[Mask, str], None]) -> Watch:
        """Start a watch; raises OSError. Several watches of one file may be held at once."""
        number: int = self._libc.inotify_add_watch(
            self._fd, os.fsencode(path), ctypes.c_uint32(int(mask) | _MASK_ADD)
        )
        if number < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
        watch = Watch(number, mask, callback)
        self._watches.setdefault(number, []).append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """No call back after this; harmless when the file, and with it the watch, is gone."""
        holders = self._watches.get(watch.number, [])
        if watch in holders:
            holders.remove(watch)
            if not holders:
                del self._watches[watch.number]
                self._libc.inotify_rm_watch(self._fd, watch.number)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            # not in the loop: the kernel waits for RCU, measured 8 to 19 ms (6.18, 2026-11)
            self._loop.run_in_executor(None, os.close, self._fd)
            self._fd = -1
        self._watches.clear()

    def _drain(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            number, bits, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            mask = Mask(bits & 0xFFFF)
            if mask & Mask.Q_OVERFLOW:
                # Events were lost: every watch looks for itself.
                everyone = [watch for holders in self._watches.values() for watch in holders]
                for watch in everyone:
                    watch.callback(watch.mask, "")
                continue
            holders = list(self._watches.get(number, ()))
            if mask & Mask.IGNORED:
                self._watches.pop(number, None)
            for watch in holders:
                if mask & (watch.mask | Mask.IGNORED):
                    watch.callback(mask, name)
