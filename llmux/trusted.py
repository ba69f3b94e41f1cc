"""Paths that root may follow: only root (or the user llmux runs as) could have put them there.

Directories are judged before anything in them is opened: by owner, mode and every directory above,
as written and with symbolic links resolved. Imports nothing of llmux.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

PRIVATE_MODE = 0o700
USE_OWN_DIRECTORY = (
    "set checkpoint.images_dir to a directory of root's that no one else can write to, such as the"
    " default /var/lib/llmux/checkpoints"
)


class UntrustedPath(OSError):
    """Another user could redirect what is opened there; ``strerror`` says which and how."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EPERM, reason)

    def __str__(self) -> str:
        return str(self.strerror)


def _trusted_users() -> frozenset[int]:
    return frozenset({0, os.geteuid()})


def untrusted(path: str) -> str | None:
    """Which user other than root and ours can put things at ``path``; None when no one can.

    What does not exist yet is judged by the directories above it.
    """
    for start in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
        here = start
        while True:
            if reason := _one(here):
                return reason
            if here == "/":
                break
            here = os.path.dirname(here)
    return None


def _one(path: str) -> str | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror}"
    if status.st_uid not in _trusted_users():
        return f"{path} belongs to user {status.st_uid}"
    # In a sticky directory (/tmp) only the owner can rename or remove an entry.
    writable = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    if writable and not stat.S_ISLNK(status.st_mode):
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def unsafe_directory(path: str) -> str | None:
    """As ``untrusted``, and other users can neither read nor write in it. It must exist."""
    if reason := untrusted(path):
        return reason
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a directory"
    if mode & 0o077:
        return f"{path} is open to others (mode {mode:o})"
    return None


def unsafe_file(path: str) -> str | None:
    """Why a file must not be trusted by root, whose directory is; None when it may be."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a plain file"
    if status.st_uid not in _trusted_users():
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def make_private(path: str) -> None:
    """A directory of ours, 0700 if we make it. UntrustedPath when it, or one above, is not.

    Exclusive: one that another user made first, in /tmp say, is refused and not used as found.
    """
    above = os.path.dirname(os.path.abspath(path))
    os.makedirs(above, mode=0o755, exist_ok=True)
    if reason := untrusted(above):
        raise UntrustedPath(reason)
    with suppress(FileExistsError):
        os.mkdir(path, PRIVATE_MODE)
    if reason := untrusted(path):
        raise UntrustedPath(reason)


def open_private(path: str) -> int:
    """A descriptor of the directory that ``make_private`` makes, closed to other users.

    Entries opened relative to it cannot be redirected. Raises OSError.
    """
    make_private(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
            os.fchmod(fd, PRIVATE_MODE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_own(directory: int, name: str, flags: int, mode: int = 0o600) -> int:
    """Open a plain file of ours in a directory, links not followed. Raises OSError."""
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedPath(f"{name} is not a plain file")
        if status.st_uid not in _trusted_users():
            raise UntrustedPath(f"{name} belongs to user {status.st_uid}")
    except BaseException:
        os.close(fd)
        raise
    return fd
