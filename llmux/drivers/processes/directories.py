"""The directories that an engine finds when it starts: for its sockets, and its home.

Root makes them inside directories of root's, and never follows a link on the way. The engine that
ran before owned them: whatever it left is removed from the one and kept in the other.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from grp import getgrnam
from typing import Final

from llmux.errors import UnitFailed
from llmux.ports import EngineUser, LaunchSpec
from llmux.trusted import UntrustedPath, untrusted

GATEWAY_GROUP: Final = "llmux"  # the front end's group: it must reach the sockets
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def prepare_directories(spec: LaunchSpec) -> None:
    """Make ``spec.runtime_dir``, empty, and the user's home. Raises UnitFailed."""
    where = spec.runtime_dir
    try:
        _make_runtime_dir(where, spec.user)
        if spec.user is not None and spec.user.temporary is not None:
            where = spec.user.home
            _make_home(where, spec.user)
    except OSError as error:
        target = f'model "{spec.model}"'
        cause = str(error) if isinstance(error, UntrustedPath) else error.strerror
        raise UnitFailed("start", target, f"cannot make its directory {where}: {cause}") from error


def _make_runtime_dir(path: str, user: EngineUser | None) -> None:
    """02750, the engine user's, group llmux where there is one: the engine binds sockets in it, the
    gateway connects to them. Without root it is 0700 and ours."""
    os.makedirs(path, mode=0o755, exist_ok=True)
    # O_NOFOLLOW: the directory may belong to the engine's user, who must not redirect our chown.
    fd = os.open(path, _FLAGS)
    try:
        # A killed engine leaves its sockets, and the next one binds none that exists.
        empty(fd)
        if os.geteuid() != 0:
            os.fchmod(fd, 0o700)
            return
        gid = user.gid if user else os.getegid()
        with suppress(KeyError):
            gid = getgrnam(GATEWAY_GROUP).gr_gid
        os.fchown(fd, user.uid if user else os.geteuid(), gid)
        os.fchmod(fd, 0o2750)
    finally:
        os.close(fd)


def _make_home(path: str, user: EngineUser) -> None:
    """0700 and the user's. UntrustedPath when it belongs to another one."""
    above = os.path.dirname(path)
    os.makedirs(above, mode=0o711, exist_ok=True)
    if reason := untrusted(above):
        raise UntrustedPath(reason)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    fd = os.open(path, _FLAGS)
    try:
        owner = os.fstat(fd).st_uid
        if owner not in (0, user.uid):
            raise UntrustedPath(
                f"it belongs to user {owner}, and the model's is {user.uid}"
                f" (next step: `chown -R {user.uid}:{user.gid} {path}`, or remove it)"
            )
        os.fchown(fd, user.uid, user.gid)
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)


def empty(directory: int) -> None:
    """Remove every entry, links not followed. Raises OSError.

    Not recursive: an engine could nest directories deeper than any stack. What is in a subdirectory
    is moved up, until there is none left.
    """
    while names := os.listdir(directory):
        for name in names:
            try:
                os.unlink(name, dir_fd=directory)
            except IsADirectoryError:
                _dissolve(directory, name)
            except FileNotFoundError:
                continue


def _dissolve(directory: int, name: str) -> None:
    with suppress(FileNotFoundError):
        inside = os.open(name, _FLAGS, dir_fd=directory)
        try:
            for child in os.listdir(inside):
                up = f".{secrets.token_hex(8)}"
                with suppress(FileNotFoundError):
                    os.rename(child, up, src_dir_fd=inside, dst_dir_fd=directory)
        finally:
            os.close(inside)
        os.rmdir(name, dir_fd=directory)
