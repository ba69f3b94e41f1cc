"""The peers of unix sockets, from sock_diag(7): /proc/net/unix does not show them.

Only looks, at the network namespace of the caller.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/unix_diag.h>
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_UDIAG_SHOW_PEER: Final = 4
_UNIX_DIAG_PEER: Final = 2
_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST: Final = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, cookie
_MESSAGE: Final = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, cookie
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_ANY: Final = 0xFFFFFFFF

CONNECTED_TYPES: Final = frozenset({socket.SOCK_STREAM, socket.SOCK_SEQPACKET})


def stream_peers() -> dict[str, str]:
    """inode → the peer's inode of connected stream and seqpacket sockets, as /proc/PID/fd has them.

    Raises OSError where the kernel has no unix_diag.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY, 0, _UDIAG_SHOW_PEER, _ANY, _ANY)
        length = _HEADER.size + len(request)
        header = _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
        sock.sendall(header + request)
        return dict(_answers(sock))


def _answers(sock: socket.socket) -> Iterator[tuple[str, str]]:
    while True:
        data = sock.recv(1 << 16)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind == _NLMSG_DONE:
                return
            body = data[_HEADER.size : length]
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, os.strerror(number))
            _, socket_type, _, _, inode, *_ = _MESSAGE.unpack_from(body)
            peer = _peer(body[_MESSAGE.size :])
            if socket_type in CONNECTED_TYPES and peer:
                yield str(inode), str(peer)
            data = data[_aligned(length) :]


def _peer(attributes: bytes) -> int:
    """0: not connected, or not yet accepted."""
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _UNIX_DIAG_PEER:
            return int(struct.unpack_from("=I", attributes, _ATTRIBUTE.size)[0])
        attributes = attributes[_aligned(length) :]
    return 0


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def holder_of(inode: str, proc: str = "/proc") -> str:
    """The process that holds the socket, in words. Reads every descriptor: for messages only."""
    for pid in filter(str.isdigit, os.listdir(proc)):
        with suppress(OSError):
            for name in os.listdir(f"{proc}/{pid}/fd"):
                if os.readlink(f"{proc}/{pid}/fd/{name}") == f"socket:[{inode}]":
                    with open(f"{proc}/{pid}/comm") as file:
                        return f"process {pid} ({file.read().strip()})"
    return "a process that cannot be seen"


def leaving(inside: Mapping[str, object]) -> dict[str, str]:
    """Of the sockets ``inside`` (by inode) those that are connected with one that is not."""
    peers = stream_peers()
    return {
        inode: peers[inode] for inode in inside if inode in peers and peers[inode] not in inside
    }
