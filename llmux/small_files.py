"""Files that are read back as a whole: bounded, and plain ones only; and how they are replaced.

A pipe in place of a file would block its reader or writer for ever, a device would fill memory.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import BinaryIO


def opened(fd: int) -> BinaryIO:
    """To read from, and the owner of the descriptor. Raises OSError, for a directory EISDIR; then
    ``open`` alone would leave it open."""
    try:
        return open(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_small(path: str | os.PathLike[str], most: int, *, links: bool = True) -> bytes:
    """The file's bytes, links followed if ``links``. Raises OSError: also for more than ``most``
    bytes (EFBIG) and for anything but a plain file (EINVAL, for a directory EISDIR)."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    with opened(fd) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", os.fspath(path))
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", os.fspath(path))
    return data


def replace_small(path: str, data: bytes) -> None:
    """Put a new file (0600) in the place of whatever file is there, atomically. Raises OSError; the
    old file is then whole, and no other is left behind."""
    new = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(new, flags, 0o600)
    except FileExistsError:  # of a writer that was killed, or no file: nothing that is written into
        os.unlink(new)
        fd = os.open(new, flags, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            os.unlink(new)
        raise


def make_way(path: str, *, aside: bool) -> str | None:
    """Remove what is there; a directory is moved ``aside``, and its new path returned, or left.
    Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        if not aside:
            raise
        moved = f"{path}.aside-{os.urandom(4).hex()}"
        os.rename(path, moved)
        return moved
    return None
