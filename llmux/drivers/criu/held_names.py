"""Names in /dev/shm that images need, held while no engine has them.

/dev/shm is open to all: who makes a file under one of these names while a model is parked turns
its restore into a cold start. So a file of root's, which no other user can open, rename or remove
there, stands for each name, from the end of the dump until the restore puts the kept file in its
place, and it goes with the image. Its text says that it is ours: no other file is removed.

It appears under its name whole and in one step, so that no crash leaves one that is not known as
ours, and one that no image needs goes at the next start.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from threading import Lock
from typing import Final
from zlib import crc32

from llmux.drivers.criu import image_format
from llmux.drivers.images.manifest import NAME, ManifestError, ShmGroup, load_manifest
from llmux.drivers.images.store import ImageStore
from llmux.small_files import read_small

_MODE: Final = 0o400
_LINK: Final = "link_remap."  # CRIU's, with our suffix: no engine ever asks for such a name
MOST: Final = 4096  # of one image: each is a page of memory, and an engine decides how many it has


def is_name(name: str) -> bool:
    return os.path.basename(name) == name and name not in ("", ".", "..")


MAX_BYTES: Final = 64 * 1024 * 1024  # of CRIU's list of files; a vLLM's has 0.2


class HeldNames:
    """Blocks; for worker threads. The names of a model whose engine lives are the engine's, but
    for CRIU's links: it may remove one and make it again."""

    def __init__(self, store: ImageStore, shm: str) -> None:
        self._store = store
        self._shm = shm
        self._text = f"held by llmux for an image in {store.root}\n".encode()
        self._temporary = f".llmux-{crc32(self._text):08x}-"
        self._lock = Lock()
        self._alive: set[str] = set()
        self._dumped: dict[str, frozenset[str]] = {}
        self._read: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}

    # ---- what happens to engines and images -----------------------------------------------------

    def recover(self, alive: Iterable[str]) -> None:
        """This llmux has just come up."""
        with self._lock:
            self._alive = set(alive)
            self._remove_temporaries()
            self._settle(self._wanted())

    def settle(self) -> None:
        """Hold what the images need by now, let go of the rest."""
        with self._lock:
            self._settle(self._wanted())

    def begin(self, model: str) -> None:
        """The model gets an engine, which may use the names."""
        with self._lock:
            self._alive.add(model)
            for name in self._names_of(self._store.image_directory(model)):
                if not name.startswith(_LINK) and self.is_ours(name):
                    os.unlink(os.path.join(self._shm, name))

    def end(self, model: str, names: Iterable[str]) -> None:
        """The model's engine is dead and has left files under ``names``."""
        with self._lock:
            self._alive.discard(model)
            wanted = self._wanted()
            self._give_up(names, wanted)
            self._settle(wanted)

    def dumped(self, model: str, names: Iterable[str], left: Iterable[str]) -> None:
        """The model's processes are gone: what they ``left`` goes, and the ``names`` that an image
        of them will need are held, until ``published``."""
        with self._lock:
            self._dumped[model] = frozenset(names)
            self._give_up(left, self._wanted())

    def published(self, model: str, *, whole: bool) -> None:
        """The image is there, or there will be none (not ``whole``)."""
        with self._lock:
            self._dumped.pop(model, None)
            if whole:
                self._alive.discard(model)
            self._settle(self._wanted())

    def give_up(self, names: Iterable[str]) -> None:
        """Remove these files; who needs their names keeps them."""
        with self._lock:
            self._give_up(names, self._wanted())

    # ---- files ----------------------------------------------------------------------------------

    def is_ours(self, name: str) -> bool:
        """Whether there is nothing under the name but a file that holds it."""
        path = os.path.join(self._shm, name)
        try:
            status = os.lstat(path)
            expected = (os.geteuid(), _MODE, len(self._text))
            if not stat.S_ISREG(status.st_mode) or expected != (
                status.st_uid,
                stat.S_IMODE(status.st_mode),
                status.st_size,
            ):
                return False
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return os.read(fd, len(self._text) + 1) == self._text
        finally:
            os.close(fd)

    def make(self, name: str) -> int:
        """A new, empty file under the name, in the place of what holds it; its descriptor, to be
        closed. FileExistsError when somebody else's file is there."""
        fd = self._unnamed(0o600)
        try:
            self._replace(fd, name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def add(self, fd: int, name: str) -> None:
        """One more name for such a file."""
        self._replace(fd, name)

    def _replace(self, fd: int, name: str) -> None:
        with self._lock:
            # nobody else can remove ours, so that it is still what is replaced
            if self.is_ours(name):
                self._rename_to(fd, name)
            else:
                _link(fd, os.path.join(self._shm, name))

    def _settle(self, wanted: set[str]) -> None:
        with suppress(FileNotFoundError):
            for name in os.listdir(self._shm):
                if name not in wanted and self.is_ours(name):
                    os.unlink(os.path.join(self._shm, name))
        for name in wanted:
            # a full tmpfs: the name stays free, as it was
            with suppress(OSError):
                self._hold(name)

    def _give_up(self, names: Iterable[str], wanted: set[str]) -> None:
        for name in filter(is_name, names):
            with suppress(FileNotFoundError):
                if name in wanted:
                    with suppress(OSError):
                        self._hold_in_place_of(name)
                        continue
                os.unlink(os.path.join(self._shm, name))

    def _hold(self, name: str) -> None:
        path = os.path.join(self._shm, name)
        if os.path.lexists(path):
            return
        fd = self._holding()
        try:
            _link(fd, path)
        finally:
            os.close(fd)

    def _hold_in_place_of(self, name: str) -> None:
        """In one step: a name that is free for a moment can be taken in it."""
        os.lstat(os.path.join(self._shm, name))
        fd = self._holding()
        try:
            self._rename_to(fd, name)
        finally:
            os.close(fd)

    def _holding(self) -> int:
        fd = self._unnamed(_MODE)
        try:
            os.write(fd, self._text)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _unnamed(self, mode: int) -> int:
        fd = os.open(self._shm, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode)
        os.fchmod(fd, mode)
        return fd

    def _rename_to(self, fd: int, name: str) -> None:
        temporary = os.path.join(self._shm, self._temporary + secrets.token_hex(8))
        _link(fd, temporary)
        try:
            os.rename(temporary, os.path.join(self._shm, name))
        except OSError:
            os.unlink(temporary)
            raise

    def _remove_temporaries(self) -> None:
        """Of a supervisor that was killed between a link and its rename."""
        names = os.listdir(self._shm) if os.path.isdir(self._shm) else []
        for name in names:
            path = os.path.join(self._shm, name)
            with suppress(FileNotFoundError):
                if name.startswith(self._temporary) and os.lstat(path).st_uid == os.geteuid():
                    os.unlink(path)

    # ---- what images need -----------------------------------------------------------------------

    def _wanted(self) -> set[str]:
        wanted = {name for names in self._dumped.values() for name in names}
        for model, path in self._store.image_directories():
            names = self._names_of(path)
            alive = model in self._alive
            wanted.update(name for name in names if not alive or name.startswith(_LINK))
        return wanted

    def _names_of(self, path: str) -> frozenset[str]:
        """Of the image in ``path``; empty without one. Read again only when it is another."""
        try:
            status = os.lstat(os.path.join(path, NAME))
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            known = self._read.get(path)
            if known is None or known[0] != stamp:
                names = needed_names(load_manifest(path).shm, path, self._shm)
                known = self._read[path] = stamp, names
        except (OSError, ManifestError):
            self._read.pop(path, None)
            return frozenset()
        return known[1]


def _link(fd: int, path: str) -> None:
    """FileExistsError when there is something."""
    # with a directory's descriptor Python calls linkat, which can follow the link in /proc
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def needed_names(groups: Iterable[ShmGroup], image: str, shm: str) -> frozenset[str]:
    """Of kept files, and those that CRIU makes for a moment for files that had lost theirs."""
    kept = {name for group in groups for name in group.names}
    made: set[str] = set()
    with suppress(OSError, image_format.BadImage):
        for name, left in read_remapped(image).items():
            # where a name is taken CRIU tries NAME.cr_link (files-reg.c: open_path)
            paths = (name, f"{name}.cr_link", left)
            made.update(os.path.basename(one) for one in paths if os.path.dirname(one) == shm)
    names = filter(is_name, [*sorted(kept), *sorted(made - kept)])
    return frozenset(islice(names, MOST))


def read_remapped(image: str) -> dict[str, str]:
    """``image_format.remapped_names`` of an image; empty without deleted files."""

    def read(name: str) -> bytes:
        return read_small(os.path.join(image, name), MAX_BYTES, links=False)

    try:
        remaps = read(image_format.REMAPS)
    except FileNotFoundError:
        return {}
    return image_format.remapped_names(read(image_format.FILES), remaps)
