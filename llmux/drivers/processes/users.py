"""Which user an engine runs as: one of its own for each model, or one that was configured.

The model's uid is kept in a file of root's over restarts and reinstallations: its caches and its
images belong to that uid. No entry in /etc/passwd is needed for it, and none is made.
"""

from __future__ import annotations

import grp
import json
import logging
import os
import pwd
import secrets
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from llmux import typed_json
from llmux.config.schema import ENGINES
from llmux.errors import LlmuxError
from llmux.ports import EngineUser
from llmux.trusted import make_private, open_own, open_private
from llmux.typed_json import BadJson

log = logging.getLogger("llmux")

# systemd's UIDS-GIDS.md: 60706 to 61183 is "unused"; below are its greeters, above DynamicUser=.
FIRST, LAST = 60706, 61183
VERSION: Final = 1
MAX_BYTES: Final = 1024 * 1024


def _missing(user: str) -> LlmuxError:
    return LlmuxError(
        f'cannot start engines: there is no user "{user}" on this machine',
        hint="create it with `systemd-sysusers`, or set engine_user to one that exists",
    )


def _entry(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise _missing(user) from None


class SharedUser:
    """EngineUsers: the one that ``engine_user`` names, for all models.

    ``cache``: no home by itself, as each model has its directory there.
    """

    def __init__(self, name: str, cache: str) -> None:
        self._name = name
        self._cache = cache

    def find(self, model: str) -> EngineUser:
        entry = _entry(self._name)
        home = entry.pw_dir
        if home == self._cache:
            home = os.path.join(self._cache, self._name)
        groups = tuple(os.getgrouplist(self._name, entry.pw_gid))
        return EngineUser(self._name, entry.pw_uid, entry.pw_gid, home, groups)


@dataclass(frozen=True, slots=True)
class _File:
    version: int
    users: dict[str, int] = field(default_factory=dict)


class ModelUsers:
    """EngineUsers: a uid of its own for every model.

    ``path``: the file that keeps them, in a directory of root's. ``home``: model → its directory,
    whose owner says its uid when the file was lost. ``groups_of``: the user whose groups engines
    have. May be called from several threads.
    """

    def __init__(
        self,
        path: str,
        home: Callable[[str], str],
        *,
        groups_of: str = ENGINES,
        uids: tuple[int, int] = (FIRST, LAST),
        proc: str = "/proc",
    ) -> None:
        self._path = path
        self._home = home
        self._groups_of = groups_of
        self._range = range(uids[0], uids[1] + 1)
        self._proc = proc
        self._lock = threading.Lock()
        self._known: dict[str, int] | None = None

    def find(self, model: str) -> EngineUser:
        entry = _entry(self._groups_of)
        with self._lock:
            uid = self._uid(model)
        return self._user(model, uid, entry)

    def plan(self, model: str) -> EngineUser:
        """The user that ``find`` would give now; nothing is written. For one who only looks."""
        entry = _entry(self._groups_of)
        with self._lock:
            known = self._read()
            uid = known.get(model)
            if uid is None:
                uid = self._allocate(model, known)
        return self._user(model, uid, entry)

    def _user(self, model: str, uid: int, entry: pwd.struct_passwd) -> EngineUser:
        home = self._home(model)
        groups = tuple(os.getgrouplist(self._groups_of, entry.pw_gid))
        return EngineUser(f"llmux-{uid}", uid, uid, home, groups, temporary=f"{home}/tmp")  # noqa: S108  # not the one for all

    def _uid(self, model: str) -> int:
        if self._known is None:
            self._known = self._read()
        if (uid := self._known.get(model)) is None:
            uid = self._allocate(model, self._known)
            self._known = {
                **{name: its for name, its in self._known.items() if its != uid},
                model: uid,
            }
            self._write(self._known)
        return uid

    # ---- giving out -----------------------------------------------------------------------------

    def _allocate(self, model: str, known: Mapping[str, int]) -> int:
        taken = {uid: name for name, uid in known.items()}
        owner = self._owner(model)
        if owner is not None and owner not in taken:
            return owner
        busy = self._uids_of_processes()
        # From a place that its name gives: the hosts of a fleet mostly give a model the same uid,
        # so that its images travel.
        first = zlib.crc32(os.fsencode(model)) % len(self._range)
        candidates: list[int] = [*self._range[first:], *self._range[:first]]
        for uid in candidates:
            if uid not in taken and uid not in busy and not _has_name(uid):
                return uid
        # A model that is gone, with nothing left that is its own.
        for uid, name in taken.items():
            if uid not in busy and not os.path.lexists(self._home(name)):
                return uid
        parent = os.path.dirname(self._home(model))
        raise LlmuxError(
            f'cannot give model "{model}" a user: all {len(self._range)} are in use',
            hint=f"remove the directories of models that are gone from {parent}",
        )

    def _owner(self, model: str) -> int | None:
        """The owner of the model's home, if it is one of ours."""
        with suppress(OSError):
            status = os.lstat(self._home(model))
            if stat.S_ISDIR(status.st_mode) and status.st_uid in self._range:
                return status.st_uid
        return None

    def _uids_of_processes(self) -> frozenset[int]:
        return frozenset(self._look_at_processes())

    def _look_at_processes(self) -> Iterator[int]:
        for name in filter(str.isdigit, os.listdir(self._proc)):
            with suppress(OSError):
                yield os.stat(f"{self._proc}/{name}").st_uid

    # ---- the file -------------------------------------------------------------------------------

    def _read(self) -> dict[str, int]:
        """What the file says; a damaged entry is none, its home's owner says the same."""
        try:
            directory = open_private(os.path.dirname(self._path))
            try:
                fd = open_own(directory, os.path.basename(self._path), os.O_RDONLY)
            finally:
                os.close(directory)
            with open(fd, encoding="utf-8") as file:
                written = typed_json.read(_File, typed_json.parse(file.read(MAX_BYTES)))
        except FileNotFoundError:
            return {}
        except (OSError, BadJson, UnicodeDecodeError) as error:
            log.warning("cannot read the models' users in %s: %s", self._path, error)
            return {}
        known: dict[str, int] = {}
        for model, uid in written.users.items():
            if uid in self._range and uid not in known.values():
                known[model] = uid
            else:
                log.warning("%s: uid %d of %s is none of ours alone", self._path, uid, model)
        return known

    def _write(self, users: Mapping[str, int]) -> None:
        text = json.dumps({"version": VERSION, "users": dict(users)}, indent=1, sort_keys=True)
        name = os.path.basename(self._path)
        temporary = f".{name}.{secrets.token_hex(4)}"
        try:
            make_private(os.path.dirname(self._path))
            directory = open_private(os.path.dirname(self._path))
            try:
                fd = open_own(directory, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                with open(fd, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                    file.flush()
                    os.fsync(fd)
                os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise LlmuxError(
                f"cannot keep the models' users in {self._path}: {error}",
                hint="engines are started only under a user that is kept; is the disk full?",
            ) from error


def _has_name(uid: int) -> bool:
    """Another program's: from a directory service, say."""
    with suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    with suppress(KeyError):
        grp.getgrgid(uid)
        return True
    return False
