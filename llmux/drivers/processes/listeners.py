"""Who listens at an engine's address.

An engine with a ``port`` is reached at 127.0.0.1, where any local process may listen first: it
would be granted, and get the clients' prompts. So who listens is looked up: the socket of every
listener that 127.0.0.1 could reach belongs to a process of the unit, or it is not trusted. A unix
socket is in a directory of the engine's user, where another process of that user could put its own;
its peer's credentials name the process that listens.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

from llmux.protocol import Address

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_CONNECT_SECS: Final = 1.0  # a full backlog makes connect(2) wait
_LISTEN: Final = "0A"
# Local addresses of /proc/net/tcp{,6} that 127.0.0.1 reaches: itself and "any", plain and mapped.
_REACHED: Final = frozenset(
    {
        "0100007F",
        "00000000",
        "0" * 32,
        "0000000000000000FFFF00000100007F",
        "0000000000000000FFFF000000000000",
    }
)
_UNSEEN: Final = "a process of another user or container"


def listeners(proc: str = "/proc") -> Iterator[tuple[str, int, str]]:
    """(local address as the kernel writes it, port, inode) of what listens."""
    for name in ("tcp", "tcp6"):
        with suppress(FileNotFoundError), open(f"{proc}/self/net/{name}") as file:
            for line in file.read().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    port = int(fields[1].rpartition(":")[2], 16)
                    yield fields[1], port, fields[9]


def find_stranger(address: Address, pids: Iterable[int], proc: str = "/proc") -> str | None:
    """In words, a process other than these that a connection to the address could reach; None
    without one, and where nothing listens."""
    if address.port is not None:
        return find_on_port(address.port, pids, proc)
    assert address.uds is not None
    pid = _listener(address.uds)
    if pid is None or pid in set(pids):
        return None
    return _in_words(pid, proc)


def _listener(path: str) -> int | None:
    """The process that called listen(2) for the socket at ``path``; None where nothing answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_CONNECT_SECS)
        try:
            sock.connect(path)
        except OSError:
            return None
        size = _CREDENTIALS.size
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(_CREDENTIALS.unpack(data)[0])


def find_on_port(port: int, pids: Iterable[int], proc: str = "/proc") -> str | None:
    """In words, a process other than these that 127.0.0.1:port could reach; None without one."""
    inodes = {
        inode
        for address, taken, inode in listeners(proc)
        if taken == port and address.partition(":")[0] in _REACHED
    }
    for pid in pids if inodes else ():
        inodes -= set(_sockets(pid, proc))
    return _holder(inodes, proc) if inodes else None


def _sockets(pid: int, proc: str) -> Iterator[str]:
    """The inodes of its sockets; none of a process that is gone or not ours to look at."""
    with suppress(OSError):
        for name in os.listdir(f"{proc}/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"{proc}/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    yield target[8:-1]


def _holder(inodes: Iterable[str], proc: str) -> str:
    wanted = set(inodes)
    for pid in filter(str.isdigit, os.listdir(proc)):
        if not wanted.isdisjoint(_sockets(int(pid), proc)):
            return _in_words(int(pid), proc)
    return _UNSEEN


def _in_words(pid: int, proc: str) -> str:
    with suppress(OSError), open(f"{proc}/{pid}/comm") as file:
        return f"process {pid} ({file.read().strip()})"
    return _UNSEEN
