"""What an image makes CRIU open as root: recorded at the dump, compared before and after a restore.

The engine chose those paths. While it is parked, a process of its user could put a link where a
file was, and CRIU would follow it: the restored engine would hold a file of root's. So every file,
mapping, program and working directory is recorded as the kernel knew it (device, inode, owner,
mode), and a restore is refused where a path, links not followed, leads to something else. That look
can come too early: so CRIU leaves the tree stopped, and what it really holds is compared as well
before it may run.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

from llmux.drivers.criu.tree import PROC, SHM
from llmux.drivers.images.manifest import KnownFile

# <linux/openat2.h>, kernel 5.6; the number is the same on every architecture but alpha
_NR_OPENAT2: Final = 437
_AT_FDCWD: Final = -100
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_NO_SYMLINKS: Final = 0x04
# The kernel's own: no user can put anything there, and inode numbers of a process change with it.
_KERNEL: Final = ("/proc/", "/sys/")
_DELETED: Final = " (deleted)"
# Names that the kernel gives to memory without a file.
_NO_FILES: Final = ("/memfd:", "/dev/zero", "/SYSV", "/[aio]", "/anon_hugepage")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class FileChanged(Exception):
    """A path of the image leads to something else than at the dump; the text names it."""


def open_without_links(path: str, flags: int = os.O_PATH) -> int:
    """A descriptor of ``path``, of which no part may be a symbolic link. Raises OSError."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    fd = _libc.syscall(
        ctypes.c_long(_NR_OPENAT2),
        ctypes.c_long(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


def _known(path: str, status: os.stat_result) -> KnownFile:
    return KnownFile(path, status.st_dev, status.st_ino, status.st_uid, status.st_mode)


def look(path: str) -> KnownFile:
    """What is at ``path`` now, links not followed. Raises OSError."""
    fd = open_without_links(path)
    try:
        return _known(path, os.fstat(fd))
    finally:
        os.close(fd)


def held_by(pid: int, proc: str = PROC) -> Iterator[tuple[str, os.stat_result]]:
    """(path as the kernel names it, status) of what a process has open, mapped, and stands in.

    Sockets, pipes and memory without a file are left out; a deleted file's path ends in
    ``(deleted)``.
    """
    base = f"{proc}/{pid}"
    links = [f"{base}/cwd", f"{base}/root", f"{base}/exe", *_mapped(base)]
    with suppress(FileNotFoundError, ProcessLookupError):
        links += [f"{base}/fd/{name}" for name in os.listdir(f"{base}/fd")]
    seen = set()
    for link in links:
        with suppress(OSError):  # closed since
            target = os.readlink(link)
            if target.startswith("/") and not target.startswith((*_KERNEL, *_NO_FILES)):
                status = os.stat(link)
                key = target, status.st_dev, status.st_ino
                if key not in seen:
                    seen.add(key)
                    yield target, status


def _mapped(base: str) -> list[str]:
    """One link for each mapped file: vLLM has a thousand mappings of some 300 files."""
    found: dict[tuple[str, ...], str] = {}
    with suppress(OSError), open(f"{base}/maps", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                # maps pads the addresses, the names in map_files are not padded
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found.setdefault(tuple(fields[3:]), f"{base}/map_files/{start:x}-{end:x}")
    return list(found.values())


def record(pids: Iterable[int], proc: str = PROC, shm: str = SHM) -> dict[str, KnownFile]:
    """path → what the processes hold under it now. Files in /dev/shm and deleted ones are left
    out: llmux keeps the former itself, CRIU the latter."""
    found: dict[str, KnownFile] = {}
    for pid in pids:
        for path, status in held_by(pid, proc):
            if not path.endswith(_DELETED) and not path.startswith(f"{shm}/"):
                found[path] = _known(path, status)
    return found


def complete(
    found: Mapping[str, KnownFile], names: Iterable[str], deleted: Iterable[str], shm: str = SHM
) -> tuple[KnownFile, ...]:
    """The record of an image: ``found`` before the dump, and what ``names`` in it says besides.

    Of a deleted file and of a socket the directory is recorded: CRIU makes an entry in it. Raises
    OSError when a name is gone or reached through a link by now.
    """
    gone = set(deleted)
    known = dict(found)
    for path in gone:
        if not path.startswith(f"{shm}/"):
            directory = os.path.dirname(path)
            known.setdefault(directory, look(directory))
    for path in names:
        if path not in known and path not in gone and not path.startswith((f"{shm}/", *_KERNEL)):
            known[path] = look(path)
    return tuple(known[path] for path in sorted(known))


def _difference(want: KnownFile, have: KnownFile) -> str | None:
    if (have.device, have.inode) != (want.device, want.inode):
        return f"{want.path} is another file than the one that the engine had open"
    if have.uid != want.uid:
        return f"{want.path} belongs to user {have.uid} now, and did to {want.uid}"
    if stat.S_ISREG(want.mode) and have.mode != want.mode:
        old, new = stat.S_IMODE(want.mode), stat.S_IMODE(have.mode)
        return f"{want.path} has mode {new:o} now, and had {old:o}"
    return None


def check(known: Iterable[KnownFile], ours: Iterable[str] = ()) -> None:
    """Every path leads where it led, links not followed; ``ours`` are looked after by llmux.

    Raises FileChanged.
    """
    skipped = set(ours)
    for want in known:
        if want.path in skipped:
            continue
        try:
            have = look(want.path)
        except OSError as error:
            text = f"{want.path} cannot be reached as it was: {error.strerror}"
            raise FileChanged(text) from error
        if difference := _difference(want, have):
            raise FileChanged(difference)


def check_restored(
    pids: Sequence[int],
    known: Iterable[KnownFile],
    ours: Iterable[str],
    deleted: Iterable[str],
    proc: str = PROC,
    shm: str = SHM,
) -> None:
    """What the stopped processes hold is what was recorded, or what llmux itself put there.

    ``deleted``: the names of deleted files, which CRIU makes, opens and deletes again. Raises
    FileChanged.
    """
    allowed = {(file.device, file.inode): file for file in known}
    for path in ours:
        with suppress(OSError):
            file = look(path)
            allowed[file.device, file.inode] = file
    made = set(deleted)
    for pid in pids:
        for path, status in held_by(pid, proc):
            if path.endswith(_DELETED):
                name = path.removesuffix(_DELETED)
                if name in made or os.path.dirname(name) == shm:
                    continue
            elif os.path.dirname(path) == shm:
                continue  # llmux made it, exclusively: see shm.put_back
            want = allowed.get((status.st_dev, status.st_ino))
            if want is None:
                raise FileChanged(f"process {pid} holds {path}, which it did not when dumped")
            if difference := _difference(want, _known(want.path, status)):
                raise FileChanged(difference)
