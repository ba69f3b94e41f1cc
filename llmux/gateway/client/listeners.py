"""Listening sockets for clients, TCP and unix. Imported by the gateway's parent: nothing heavy."""

from __future__ import annotations

import errno
import grp
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from llmux.config.schema import Config

BACKLOG: Final = 4096  # connections queued while a worker restarts; the kernel caps it at somaxconn


class Access(NamedTuple):
    """Who may connect to a unix socket: its mode, and its group if it is not ours."""

    mode: int = 0o660
    group: str | None = None


OURS: Final = Access()


def access_of(config: Config) -> Access:
    return Access(int(config.gateway.socket_mode, 8), config.gateway.socket_group)


def bind_all(addresses: Sequence[str], access: Access = OURS) -> list[socket.socket]:
    """Listening sockets for ``host:port`` and ``unix:/path``; an OSError names the address."""
    bound: list[socket.socket] = []
    try:
        for address in addresses:
            try:
                bound.append(_bind(address, access))
            except (OSError, ValueError) as error:
                cause = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                number = error.errno if isinstance(error, OSError) else None
                if number == errno.EADDRINUSE:
                    port = address.rpartition(":")[2]
                    cause += f" (who has it: ss -ltnp 'sport = :{port}')"
                raise OSError(number, f"cannot listen on {address}: {cause}") from error
    except OSError:
        for listener in bound:
            listener.close()
        raise
    return bound


def _bind(address: str, access: Access) -> socket.socket:
    if address.startswith("unix:"):
        return _bind_unix(Path(address.removeprefix("unix:")), access)
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    family, kind, protocol, _, name = socket.getaddrinfo(
        host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(name)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_unix(path: Path, access: Access) -> socket.socket:
    group = -1 if access.group is None else _gid_of(access.group)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _is_listening(path):
            path.unlink()
        listener.bind(str(path))
        # Until it listens no one can connect, whatever the umask left open.
        if group != -1:
            os.chown(path, -1, group)
        path.chmod(access.mode)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _gid_of(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(errno.ENOENT, f"there is no group {group} (gateway.socket_group)") from None


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def describe_socket(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{host}:{name[1]}"
    return f"unix:{name}"
