"""Small files that an engine had open in its own home: kept in its image, put back when gone.

Compilers of kernels hold lock files in their caches and delete them at the next start, and /tmp is
aged: CRIU cannot open what is gone, so that a second restore failed where the first had worked.
Nothing is ever removed or written to that is there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from llmux.drivers.criu.known_files import open_without_links
from llmux.drivers.criu.tree import PROC
from llmux.drivers.images.manifest import SmallFile
from llmux.small_files import opened

KEPT: Final = "files"  # the directory inside an image
MOST_BYTES: Final = 1 << 20  # of one file: locks, sources of kernels
MOST_FILES: Final = 256


def own_directories(env: Mapping[str, str]) -> tuple[str, ...]:
    """Where an engine with this environment keeps files of its own."""
    places = (env.get("HOME"), env.get("TMPDIR"))
    return tuple(os.path.normpath(place) for place in places if place and place != "/")


def _is_below(path: str, directories: Iterable[str]) -> bool:
    return path == os.path.normpath(path) and any(path.startswith(f"{d}/") for d in directories)


def find(
    pids: Iterable[int], directories: Collection[str], proc: str = PROC
) -> dict[str, tuple[int, int]]:
    """path → (device, inode) of what the living processes have open there."""
    found: dict[str, tuple[int, int]] = {}
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"{proc}/{pid}/fd"):
                with suppress(OSError):  # closed since
                    path = os.readlink(f"{proc}/{pid}/fd/{name}")
                    status = os.stat(f"{proc}/{pid}/fd/{name}")
                    small = stat.S_ISREG(status.st_mode) and status.st_size <= MOST_BYTES
                    if small and status.st_nlink and _is_below(path, directories):
                        found[path] = status.st_dev, status.st_ino
    return found


def keep(found: Mapping[str, tuple[int, int]], image: str) -> tuple[SmallFile, ...]:
    """Copy them into ``image``. The processes are gone, so the content stands still; one that is
    gone or replaced by now is left out."""
    kept: list[SmallFile] = []
    for path in sorted(found)[:MOST_FILES]:
        with suppress(OSError):
            fd = open_without_links(path, os.O_RDONLY | os.O_NONBLOCK)
            with opened(fd) as source:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != found[path]:
                    continue
                data = source.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                continue
            os.makedirs(os.path.join(image, KEPT), mode=0o700, exist_ok=True)
            name = f"{KEPT}/{len(kept)}"
            with open(os.path.join(image, name), "xb") as target:
                target.write(data)
            mode = stat.S_IMODE(status.st_mode)
            kept.append(SmallFile(path, name, len(data), mode, status.st_uid, status.st_gid))
    return tuple(kept)


def put_back(
    files: Sequence[SmallFile], image: str, directories: Collection[str]
) -> tuple[str, ...]:
    """Make those that are gone again; returns the paths that lead to what the engine had open, by
    content. Only below ``directories``, which are the engine's: a path in an image is no reason to
    write anywhere else. Raises OSError."""
    right: list[str] = []
    for file in files:
        if not _is_below(file.path, directories):
            continue
        with open(os.path.join(image, file.file), "rb") as source:
            data = source.read(MOST_BYTES)
        if _make(file, data) or _is_same(file, data):
            right.append(file.path)
    return tuple(right)


def _make(file: SmallFile, data: bytes) -> bool:
    """Whether it was gone and is there again. Links in its path are not followed."""
    try:
        directory = open_without_links(os.path.dirname(file.path), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False  # the check of all paths says what is wrong with it
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        if os.fstat(directory).st_uid != file.uid:
            return False
        fd = os.open(os.path.basename(file.path), flags, 0o600, dir_fd=directory)
        with open(fd, "wb") as target:
            target.write(data)
            os.fchown(fd, file.uid, file.gid)
            os.fchmod(fd, file.mode)
        return True
    except FileExistsError:
        return False
    finally:
        os.close(directory)


def _is_same(file: SmallFile, data: bytes) -> bool:
    with suppress(OSError):
        fd = open_without_links(file.path, os.O_RDONLY | os.O_NONBLOCK)
        with opened(fd) as there:
            status = os.fstat(fd)
            mode = stat.S_IMODE(status.st_mode)
            alike = stat.S_ISREG(status.st_mode) and (status.st_uid, mode) == (file.uid, file.mode)
            return alike and there.read(MOST_BYTES + 1) == data
    return False
