"""Checks before a restore: pids, ports and sockets are free, the files the engine expects exist.

Blocks briefly; runs in a worker thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress

from llmux.drivers.criu.tree import PROC, decode_address, read_status, read_unix
from llmux.drivers.images.manifest import KeptPath, Manifest
from llmux.drivers.memory import available_bytes
from llmux.drivers.processes.listeners import listeners


class HostNotReady(Exception):
    """The image is all right, but this host cannot take it now: the text says why."""


def check_pids(manifest: Manifest, proc: str = PROC) -> None:
    """Every pid and thread id comes back as it was, so all must be free. Raises HostNotReady."""
    for process in manifest.processes:
        for tid in process.tids:
            # /proc/TID exists for threads too, though listings of /proc do not show them.
            if (status := read_status(tid, proc)) is not None:
                what = "pid" if tid == process.pid else "thread id"
                owner = status.get("Tgid", "?")
                state = ", a zombie" if status.get("State", "").startswith("Z") else ""
                raise HostNotReady(
                    f"{what} {tid} of the image is taken by process {owner}"
                    f" ({status.get('Name', '?')}{state})"
                )


def check_ports(manifest: Manifest, proc: str = PROC) -> None:
    """The TCP ports that the engine listened on must be free. Raises HostNotReady."""
    wanted = set(manifest.tcp_ports)
    for address, port, _ in listeners(proc) if wanted else ():
        if port in wanted:
            raise HostNotReady(
                f"the engine's port {port} is in use: something listens on"
                f" {decode_address(address)}"
            )


def clear_sockets(manifest: Manifest, proc: str = PROC) -> None:
    """Remove the sockets that the engine left behind in its runtime directory, where it will
    bind again. Elsewhere we remove nothing: the engine chose those paths, and we are root.

    Raises HostNotReady when one of them is in use or is something else.
    """
    if not manifest.unix_paths or manifest.runtime_dir is None:
        return
    ours = os.path.realpath(manifest.runtime_dir.path)
    listening = {path for path, accepting in read_unix(os.getpid(), proc).values() if accepting}
    for path in manifest.unix_paths:
        with suppress(FileNotFoundError):
            if path in listening:
                raise HostNotReady(f"another process listens on the engine's socket {path}")
            if os.path.realpath(os.path.dirname(path)) != ours:
                continue
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise HostNotReady(f"{path} is in the way of the engine's socket and is no socket")
            os.unlink(path)


def put_right(manifest: Manifest) -> None:
    """The runtime directory and the append-only files exist, with their owners. Raises
    HostNotReady."""
    try:
        if (kept := manifest.runtime_dir) is not None:
            os.makedirs(kept.path, mode=0o755, exist_ok=True)
            _own(kept, os.O_DIRECTORY)
        for kept in manifest.append_files:
            os.makedirs(os.path.dirname(kept.path), mode=0o755, exist_ok=True)
            # O_APPEND is what exempts a file from CRIU's check of its size (criu/files-reg.c).
            _own(kept, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise HostNotReady(f"{error.filename or 'a file'}: {error.strerror}") from error


def _own(kept: KeptPath, flags: int) -> None:
    # O_NOFOLLOW and by descriptor: the engine's user may own the place and must not redirect us.
    fd = os.open(kept.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, kept.mode & 0o777)
    try:
        status = os.fstat(fd)
        if (status.st_uid, status.st_gid) != (kept.uid, kept.gid):
            os.fchown(fd, kept.uid, kept.gid)
        if status.st_mode & 0o7777 != kept.mode:
            os.fchmod(fd, kept.mode)
    finally:
        os.close(fd)


def missing_processes(manifest: Manifest, members: list[int], proc: str = PROC) -> list[str]:
    """Which processes of the image are not there as they should be after a restore."""
    wrong = []
    for process in manifest.processes:
        status = read_status(process.pid, proc)
        if status is None or status.get("State", "Z")[:1] in "ZX":
            wrong.append(f"process {process.pid} ({process.comm}) is not alive")
        elif status.get("Name") != process.comm:
            wrong.append(f"process {process.pid} is {status.get('Name')}, not {process.comm}")
        elif process.pid not in members:
            wrong.append(f"process {process.pid} ({process.comm}) is outside the new unit")
    return wrong


def check_memory(
    needed: int, reserve_bytes: int = 0, available: Callable[[], int] = available_bytes
) -> None:
    """Raises HostNotReady when ``needed`` and ``reserve_bytes`` together exceed MemAvailable, what
    the kernel can give without swapping."""
    have = available()
    if have < needed + reserve_bytes:
        left = f", {reserve_bytes} must be left" if reserve_bytes else ""
        raise HostNotReady(
            f"the engine needs {needed} bytes of memory{left}, and {have} are available"
        )
