"""The files in /dev/shm that belong to an image: kept in it, put back before a restore.

CRIU stores neither the named files in /dev/shm that a tree maps nor the links it makes there for
the deleted ones, and it removes those links when a restore has succeeded. So an image lasts for
one restore on the same boot, unless they are copied. A group is one inode with all its names:
semaphores are shared between processes only if those names are hard links to one inode again.

Nothing is ever removed by pattern: other programs have files there too. A file is ours when its
inode was mapped by our tree (before a dump), or when we made it (before a restore).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from llmux.drivers.criu.held_names import HeldNames, is_name
from llmux.drivers.criu.known_files import open_without_links
from llmux.drivers.criu.tree import PROC, SHM
from llmux.drivers.images.files import copy_sparse
from llmux.drivers.images.manifest import ShmGroup

KEPT: Final = "shm"  # the directory inside an image


class ShmTaken(Exception):
    """A name that the image needs in /dev/shm is in use by another process; the text names both."""


def find_names(
    inodes: Iterable[tuple[int, int]], shm: str = SHM
) -> dict[tuple[int, int], list[str]]:
    """(device, inode) → names in /dev/shm, for those of ``inodes`` that have any."""
    wanted = set(inodes)
    found: dict[tuple[int, int], list[str]] = {}
    for entry in os.scandir(shm):
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            key = status.st_dev, status.st_ino
            if key in wanted and stat.S_ISREG(status.st_mode):
                found.setdefault(key, []).append(entry.name)
    return {key: sorted(names) for key, names in sorted(found.items())}


def keep(
    groups: dict[tuple[int, int], list[str]],
    image: str,
    renamed: dict[str, str],
    shm: str = SHM,
) -> tuple[ShmGroup, ...]:
    """Copy the groups into ``image``; ``renamed`` (old → new path) are the links' names from now
    on.

    The processes are gone by now, so the content stands still.
    """
    if not groups:
        return ()
    os.makedirs(os.path.join(image, KEPT), mode=0o700, exist_ok=True)
    kept = []
    for index, names in enumerate(groups.values()):
        file = f"{KEPT}/{index}"
        source = os.open(os.path.join(shm, names[0]), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            target = os.open(
                os.path.join(image, file),
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                0o600,
            )
            try:
                status = os.fstat(source)
                copy_sparse(source, target, status.st_size)
            finally:
                os.close(target)
        finally:
            os.close(source)
        new = (os.path.basename(renamed.get(f"{SHM}/{name}", name)) for name in names)
        kept.append(
            ShmGroup(
                names=tuple(sorted(new)),
                file=file,
                size=status.st_size,
                mode=stat.S_IMODE(status.st_mode),
                uid=status.st_uid,
                gid=status.st_gid,
            )
        )
    return tuple(kept)


def remove(names: Iterable[str], shm: str = SHM) -> None:
    """Remove exactly these; what is gone already is fine."""
    for name in names:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(shm, name))


def _user_of(device: int, inode: int, proc: str) -> tuple[int, str] | None:
    """(pid, name) of a process that maps or holds a file. Looks at every process: rare conflicts
    only."""
    wanted = f" {os.major(device):02x}:{os.minor(device):02x} {inode} "
    for pid in filter(str.isdigit, os.listdir(proc)):
        with suppress(OSError):
            with open(f"{proc}/{pid}/comm") as file:
                comm = file.read().strip()
            with open(f"{proc}/{pid}/maps", errors="replace") as file:
                if any(wanted in line for line in file):
                    return int(pid), comm
            for name in os.listdir(f"{proc}/{pid}/fd"):
                with suppress(OSError):
                    status = os.stat(f"{proc}/{pid}/fd/{name}")
                    if (status.st_dev, status.st_ino) == (device, inode):
                        return int(pid), comm
    return None


def set_aside_links(token: str, shm: str = SHM, proc: str = PROC) -> tuple[list[str], list[str]]:
    """Rename the ``link_remap.N`` in /dev/shm, with which another CRIU that was killed stands in
    the way of ours: (what was renamed, the others with the process that uses each)."""
    moved, used = [], []
    for name in sorted(os.listdir(shm)):
        path = os.path.join(shm, name)
        if not re.fullmatch(r"link_remap\.[0-9]+", name):
            continue
        with suppress(FileNotFoundError):
            status = os.lstat(path)
            if user := _user_of(status.st_dev, status.st_ino, proc):
                used.append(f"{path}, which process {user[0]} ({user[1]}) uses")
            else:
                os.rename(path, f"{path}.aside-{token}")
                moved.append(path)
    return moved, used


def _clear(path: str, uid: int, proc: str) -> None:
    """Remove a file left by an earlier run of the same engine. ShmTaken when a process uses it or
    another user owns it."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if status.st_uid != uid or not stat.S_ISREG(status.st_mode):
        raise ShmTaken(f"{path} exists and belongs to user {status.st_uid}, not {uid}")
    if user := _user_of(status.st_dev, status.st_ino, proc):
        raise ShmTaken(f"{path} exists and is used by process {user[0]} ({user[1]})")
    os.unlink(path)


def remove_leftovers(paths: Iterable[str], uid: int, shm: str = SHM, proc: str = PROC) -> None:
    """Remove what a killed restore left (``image_format.remapped_names``): in /dev/shm, and ghosts
    anywhere, unless a process uses them. ``uid`` is the engine's user, no link is followed."""
    for path in paths:
        if os.path.dirname(path) != shm and not path.endswith(".ghost"):
            continue
        with suppress(OSError):
            directory = open_without_links(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
            try:
                _unlink_left(directory, os.path.basename(path), uid, proc)
            finally:
                os.close(directory)


def _unlink_left(directory: int, name: str, uid: int, proc: str) -> None:
    """The engine's own file, or one in a directory of its: no other may be removed for it."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    owners = {status.st_uid, os.fstat(directory).st_uid}
    if (
        stat.S_ISREG(status.st_mode)
        and uid in owners
        and not _user_of(status.st_dev, status.st_ino, proc)
    ):
        os.unlink(name, dir_fd=directory)


def put_back(
    groups: Sequence[ShmGroup], image: str, held: HeldNames, shm: str = SHM, proc: str = PROC
) -> tuple[str, ...]:
    """Make the kept files in /dev/shm again; returns the names made. All or none: ShmTaken,
    OSError."""
    made: list[str] = []
    try:
        for group in groups:
            for name in group.names:
                if not is_name(name):
                    raise ShmTaken(f"{name!r} is not the name of a file in {shm}")
                if not held.is_ours(name):
                    _clear(os.path.join(shm, name), group.uid, proc)
            _make(group, image, held, made)
    except BaseException:
        held.give_up(made)
        raise
    return tuple(made)


def _make(group: ShmGroup, image: str, held: HeldNames, made: list[str]) -> None:
    source = os.open(os.path.join(image, group.file), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Under its name before it is filled: after a crash our note says what to remove.
        target = held.make(group.names[0])
        made.append(group.names[0])
        try:
            copy_sparse(source, target, group.size)
            os.fchown(target, group.uid, group.gid)
            os.fchmod(target, group.mode)
            for name in group.names[1:]:
                held.add(target, name)
                made.append(name)
        finally:
            os.close(target)
    finally:
        os.close(source)
