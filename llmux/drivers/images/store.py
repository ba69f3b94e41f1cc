"""The checkpoint store: ``<images_dir>/<model>/images/`` and what leads to and from it.

::

    <images_dir>/<model>/images/             complete, has a manifest: may be restored
                         .dump-<token>/      being made, or left by a crash: removed at start
                         .old-<token>/       replaced, being removed
                         .import/            arriving from another host: see drivers/transfer
                         quarantine-<time>-<n>/   failed, kept for a look
                         restore/            CRIU's log and pid file of the last restore
                         last-failure.log    CRIU's log of the last dump that failed

A directory becomes ``images`` only by rename, after everything in it was synced. All methods
block and are called from one worker thread at a time; the owner of the state is the file system.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from llmux.drivers.images.check import load_image
from llmux.drivers.images.files import sync_directory, sync_tree
from llmux.drivers.images.identity import BOOT_ID
from llmux.drivers.images.manifest import (
    NAME,
    Manifest,
    ManifestError,
    first_mismatch,
    load_manifest,
)
from llmux.drivers.images.notes import DUMPING, RESTORING, read_note
from llmux.errors import CheckpointFailed, TreeState
from llmux.image_ports import NONE_MADE, Image, NoImage
from llmux.names import escape, unescape
from llmux.printable import printable
from llmux.small_files import replace_small
from llmux.trusted import USE_OWN_DIRECTORY, make_private, unsafe_directory, untrusted

log = logging.getLogger(__name__)

IMAGES: Final = "images"
IMPORT: Final = ".import"
RESTORE: Final = "restore"
FAILURE_LOG: Final = "last-failure.log"
_TEMPORARY: Final = ".dump-"
_OLD: Final = ".old-"
_QUARANTINE: Final = "quarantine-"
_LAST_USED: Final = "last-used"
_IMPORT_SECS: Final = 7 * 86400.0  # how long an import that broke off may be taken up again


def _target(model: str) -> str:
    return f'model "{model}"'


class ImageStore:
    """``max_bytes``: budget for all images together, on disk. ``keep_quarantined``: failed
    images kept per model. ``across_reboot``: use an image of an earlier boot."""

    def __init__(
        self,
        images_dir: str,
        *,
        max_bytes: int | None = None,
        keep_quarantined: int = 1,
        across_reboot: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = os.path.abspath(images_dir)
        self.max_bytes = max_bytes
        self._keep_quarantined = keep_quarantined
        self._ignore = frozenset({BOOT_ID}) if across_reboot else frozenset()
        self.clock = clock
        # Directories of the user's that failed: they are not ours to move.
        self._condemned: dict[str, str] = {}

    def directory(self, model: str) -> str:
        """The model's own directory."""
        return os.path.join(self.root, escape(model))

    def _models(self) -> list[tuple[str, str]]:
        """(model, its directory) of each; empty when another user could have put them there."""
        if untrusted(self.root):
            return []
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []
        return [(unescape(name), os.path.join(self.root, name)) for name in names]

    def make_directory(self, path: str, model: str) -> None:
        """Raises CheckpointFailed when another user could put something there."""
        try:
            make_private(path)
        except OSError as error:
            raise CheckpointFailed(
                "checkpoint",
                _target(model),
                f"its images directory is not safe: {error}",
                hint=USE_OWN_DIRECTORY,
                tree=TreeState.RUNNING,
            ) from error

    # ---- making ---------------------------------------------------------------------------------

    def begin(self, model: str) -> str:
        """A new private directory for a dump. The way from it to the top was seen to be safe."""
        path = os.path.join(self.receive(model), _TEMPORARY + secrets.token_hex(4))
        os.mkdir(path, 0o700)
        return path

    def receive(self, model: str) -> str:
        """The model's directory, made if need be and seen to be safe up to the top."""
        self.make_directory(self.root, model)
        home = self.directory(model)
        self.make_directory(home, model)
        if reason := unsafe_directory(home):
            raise CheckpointFailed(
                "checkpoint",
                _target(model),
                f"its images directory is not safe: {reason}",
                hint="images become processes with any user's rights: make it root's alone",
                tree=TreeState.RUNNING,
            )
        return home

    def abandon(self, temporary: str, log_name: str) -> None:
        """Remove a failed dump; keep its log."""
        with suppress(OSError):
            os.replace(
                os.path.join(temporary, log_name),
                os.path.join(os.path.dirname(temporary), FAILURE_LOG),
            )
        shutil.rmtree(temporary, ignore_errors=True)

    def publish(self, temporary: str, manifest: Manifest) -> Image:
        """Make it the model's image, safe against a power cut. Replaces the former one."""
        sync_tree(temporary)
        path = os.path.join(temporary, NAME)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(fd)
        sync_directory(temporary)
        return self._put_in_place(temporary, manifest)

    def adopt(self, model: str, identity: Mapping[str, str]) -> Image:
        """Put the image that arrived for the model in place. Raises CheckpointFailed when it is not
        whole, not safe or does not fit."""
        path = os.path.join(self.directory(model), IMPORT)
        try:
            manifest = self.load(path)
            if manifest.model != model:
                raise ManifestError(f'it is of model "{manifest.model}"')
            if reason := first_mismatch(manifest.identity, identity, self._ignore):
                raise ManifestError(f"it does not fit: {reason}")
        except ManifestError as error:
            raise CheckpointFailed(
                "import", f"the image of {_target(model)}", str(error)
            ) from error
        return self._put_in_place(path, manifest)

    def _put_in_place(self, temporary: str, manifest: Manifest) -> Image:
        home = os.path.dirname(temporary)
        final = os.path.join(home, IMAGES)
        old = os.path.join(home, _OLD + secrets.token_hex(4))
        try:
            os.rename(final, old)
        except FileNotFoundError:
            old = ""
        os.rename(temporary, final)
        sync_directory(home)
        if old:
            shutil.rmtree(old, ignore_errors=True)
        return self._image(manifest, final, managed=True)

    # ---- finding --------------------------------------------------------------------------------

    def load(self, path: str) -> Manifest:
        """See ``check.load_image``. Raises ManifestError."""
        return load_image(path)

    def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        """The model's own image if it fits, else the one that the user named, else why not."""
        reasons = []
        own = os.path.join(self.directory(model), IMAGES)
        places = (
            [own]
            if path is None or os.path.realpath(path) == os.path.realpath(own)
            else [own, path]
        )
        for place in places:
            if place is own and not os.path.isdir(own):
                reasons.append(NONE_MADE)
                continue
            if (condemned := self._condemned.get(os.path.realpath(place))) is not None:
                reasons.append(f"{place} failed before: {condemned}")
                continue
            try:
                manifest = self.load(place)
            except ManifestError as error:
                reasons.append(f"the image in {place} cannot be used: {error}")
                continue
            if reason := first_mismatch(manifest.identity, identity, self._ignore):
                reasons.append(f"the image in {place} does not fit: {reason}")
                continue
            return self._image(manifest, place, managed=place is own)
        return NoImage("; ".join(reasons))

    def _image(self, manifest: Manifest, path: str, *, managed: bool) -> Image:
        used = manifest.created
        with suppress(OSError):
            used = os.stat(os.path.join(self.directory(manifest.model), _LAST_USED)).st_mtime
        return Image(
            model=manifest.model,
            path=path,
            identity=manifest.identity,
            recipe=manifest.recipe,
            created=manifest.created,
            dump_seconds=manifest.dump_seconds,
            root_pid=manifest.root_pid,
            apparent_bytes=manifest.apparent_bytes,
            disk_bytes=manifest.disk_bytes,
            managed=managed,
            last_used=max(used, manifest.created),
        )

    def images(self) -> Sequence[Image]:
        return [image for image, _ in self.with_manifests()]

    def image_directory(self, model: str) -> str:
        """Where the model's own image is, if it has one."""
        return os.path.join(self.directory(model), IMAGES)

    def image_directories(self) -> list[tuple[str, str]]:
        """(model, where its image is, if it has one)."""
        return [(model, os.path.join(home, IMAGES)) for model, home in self._models()]

    def with_manifests(self) -> list[tuple[Image, Manifest]]:
        found = []
        for _, home in self._models():
            path = os.path.join(home, IMAGES)
            with suppress(ManifestError):
                manifest = load_manifest(path)
                found.append((self._image(manifest, path, managed=True), manifest))
        return found

    # ---- using and losing -----------------------------------------------------------------------

    def used(self, model: str) -> None:
        """The model's image was just restored."""
        path = os.path.join(self.directory(model), _LAST_USED)
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            os.close(os.open(path, flags, 0o600))
            now = self.clock()
            os.utime(path, (now, now))

    def restore_directory(self, model: str) -> str:
        """An empty directory for the log and the pid file of a restore: the pid file must not
        exist, and the image stays as it is."""
        home = self.directory(model)
        self.make_directory(self.root, model)
        self.make_directory(home, model)
        path = os.path.join(home, RESTORE)
        shutil.rmtree(path, ignore_errors=True)
        os.mkdir(path, 0o700)
        return path

    def quarantine(self, image: Image, reason: str) -> str:
        """Put the image out of use. Of managed ones the newest few are kept for inspection."""
        if not image.managed:
            self._condemned[os.path.realpath(image.path)] = reason
            return image.path
        home = self.directory(image.model)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.clock()))
        # Behind those of the same second: the newest are what stays.
        prefix = f"{_QUARANTINE}{stamp}-"
        names = os.listdir(home) if os.path.isdir(home) else []
        ends = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        number = max((int(end) for end in ends if end.isdecimal()), default=-1) + 1
        path = os.path.join(home, f"{prefix}{number:03}")
        try:
            os.rename(image.path, path)
        except FileNotFoundError:
            return path
        with suppress(OSError):  # the log of the restore that failed is what one wants to read
            shutil.copytree(os.path.join(home, RESTORE), os.path.join(path, RESTORE))
        with suppress(OSError):
            replace_small(os.path.join(path, "reason"), f"{printable(reason)}\n".encode())
        sync_directory(home)
        names = sorted(name for name in os.listdir(home) if name.startswith(_QUARANTINE))
        for name in names[: max(len(names) - self._keep_quarantined, 0)]:
            shutil.rmtree(os.path.join(home, name), ignore_errors=True)
        return path

    def discard(self, model: str) -> None:
        """Renamed first: a removal cut short must not look like an image."""
        home = self.directory(model)
        old = os.path.join(home, _OLD + secrets.token_hex(4))
        try:
            os.rename(os.path.join(home, IMAGES), old)
        except FileNotFoundError:
            return
        shutil.rmtree(old, ignore_errors=True)

    # ---- after a crash --------------------------------------------------------------------------

    def sweep(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Unfinished dumps and restores: (model, directory, note) for each. Incomplete images
        are out of use at once; the caller removes the directories with ``forget`` after it has
        cleaned up."""
        begun = []
        for model, home in self._models():
            if not os.path.isdir(home):
                continue
            for name in sorted(os.listdir(home)):
                path = os.path.join(home, name)
                if name.startswith(_OLD):
                    shutil.rmtree(path, ignore_errors=True)
                elif name.startswith(_TEMPORARY):
                    begun.append((model, path, read_note(os.path.join(path, DUMPING))))
                elif name == IMPORT and self._abandoned(home):
                    shutil.rmtree(path, ignore_errors=True)
                elif name == RESTORING:
                    begun.append((model, path, read_note(path)))
                elif name == IMAGES and not os.path.exists(os.path.join(path, NAME)):
                    # Not by us: we rename only what is complete. Out of the way, not destroyed.
                    os.rename(
                        path, os.path.join(home, f"{_QUARANTINE}incomplete-{secrets.token_hex(4)}")
                    )
        return begun

    def _abandoned(self, home: str) -> bool:
        """Has nothing arrived for long?"""
        try:
            arrived = os.stat(os.path.join(home, f"{IMPORT}.done")).st_mtime
        except OSError:
            return True
        return self.clock() - arrived > _IMPORT_SECS

    def confirm_restore(self, model: str) -> None:
        """Remove the note by which the next supervisor would end the restored engine."""
        self.forget(os.path.join(self.directory(model), RESTORING))

    def forget(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                os.unlink(path)
