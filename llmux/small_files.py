"""Files that are read back as a whole: bounded, and plain ones only.

A pipe in place of a file would block its reader for ever, a device would fill its memory.
"""

from __future__ import annotations

import errno
import os
import stat


def read_small(path: str | os.PathLike[str], most: int) -> bytes:
    """The file's bytes, links followed. Raises OSError: also for more than ``most`` bytes (EFBIG)
    and for anything but a plain file (EINVAL, for a directory EISDIR)."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # of a directory: EISDIR
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", os.fspath(path))
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", os.fspath(path))
    return data
