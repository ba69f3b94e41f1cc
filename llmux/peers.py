"""Who is at the other end of a unix socket, which second group may be, and when it has ended.

Imports nothing of llmux.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

ADMINS: Final = "llmux-admin"  # the group that may give orders

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS: Final = 59  # <asm-generic/socket.h>; not in Python's socket module
_MAX_GROUPS: Final = 256  # Python reads 1,024 bytes at most
_UNSET_LOGIN: Final = 2**32 - 1  # of a process that no login began


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return int(pid), int(uid), int(gid)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the peer, as the kernel noted them on connect."""
    return _credentials(sock)[:2]


def peer_groups(sock: socket.socket) -> frozenset[int]:
    """The peer's groups, as the kernel noted them on connect; its own alone when it has more than
    can be read."""
    own = _credentials(sock)[2]
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:
        return frozenset({own})
    return frozenset({own, *struct.unpack(f"{len(data) // 4}I", data)})


def admit_group(path: str, group: int) -> None:
    """Let a second group read and write, by an access control list in the form of the kernel's
    posix_acl_xattr.h. OSError where the file system has none."""
    whole, no_id = 0o6, 0xFFFFFFFF
    user, owning_group, named_group, mask, other = 0x01, 0x04, 0x08, 0x10, 0x20
    entries = (
        (user, whole, no_id), (owning_group, whole, no_id), (named_group, whole, group),
        (mask, whole, no_id), (other, 0, no_id),
    )  # fmt: skip
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)


def caller_of(pid: int, uid: int) -> str:
    """The peer's user, and who logged in when that is another: `sudo` keeps it (PAM)."""
    name = user_name(uid)
    with suppress(OSError, ValueError), open(f"/proc/{pid}/loginuid") as file:
        login = int(file.read())
        if login not in (uid, _UNSET_LOGIN):
            name += f" ({user_name(login)})"
    return name


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@dataclass(slots=True)
class _Exit:
    pidfd: int
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0


class Exits:
    """Waits for exits of other processes, with one descriptor for each, however many wait."""

    def __init__(self) -> None:
        self._exits: dict[int, _Exit] = {}

    async def wait(self, pid: int, seconds: float) -> None:
        """Until the process has ended, but no longer than ``seconds``."""
        loop = asyncio.get_running_loop()
        found = self._exits.get(pid)
        if found is None:
            try:
                found = self._exits[pid] = _Exit(os.pidfd_open(pid))
            except OSError:
                return
            loop.add_reader(found.pidfd, found.ended.set)
        found.waiting += 1
        try:
            async with asyncio.timeout(seconds):
                await found.ended.wait()
        except TimeoutError:
            pass
        finally:
            found.waiting -= 1
            if not found.waiting:
                del self._exits[pid]
                loop.remove_reader(found.pidfd)
                os.close(found.pidfd)
