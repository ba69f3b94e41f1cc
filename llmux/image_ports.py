"""The port of CRIU images, and the values it exchanges; the rules are those of ``llmux.ports``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from llmux.ports import LaunchSpec, UnitHandle


@dataclass(frozen=True, slots=True)
class Image:
    """A complete checkpoint on disk: CRIU's files and a manifest in ``path``.

    ``identity`` is what must still be so for a restore, by name; ``recipe`` is how the engine was
    parked and so how it is woken, opaque to the checkpointer. ``managed``: made by llmux below its
    images directory; a directory that the user named (``checkpoint_path``) is never changed or
    removed.
    """

    model: str
    path: str
    identity: Mapping[str, str]
    recipe: Mapping[str, Any]
    created: float  # seconds since the epoch
    dump_seconds: float
    root_pid: int
    apparent_bytes: int
    disk_bytes: int
    managed: bool = True
    last_used: float = 0.0


NONE_MADE = "no checkpoint available"  # NoImage's reason where there never was one


@dataclass(frozen=True, slots=True)
class NoImage:
    """Why a model has no image to be restored: none there, or which named field differs."""

    reason: str


@dataclass(frozen=True, slots=True)
class DumpSpec:
    """What goes into an image besides the processes. ``launch`` is how the engine was started.

    ``cold_seconds``: what starting the model without the image takes; its worth when disk is short.
    """

    launch: LaunchSpec
    identity: Mapping[str, str]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    cold_seconds: float = 60.0
    frozen: bool = False  # the engine's cgroup is frozen now


class DumpPhase(StrEnum):
    """Where a dump is. From RELEASED on the processes are gone, and what they held is free."""

    CHECK = "check"
    DUMP = "dump"
    RELEASED = "released"
    PACK = "pack"  # zero blocks dropped, checksums
    SYNC = "sync"
    DONE = "done"


Progress = Callable[[DumpPhase, int, int], None]  # phase, bytes done, bytes in all (0 = unknown)


@dataclass(frozen=True, slots=True)
class CriuFacts:
    """The CRIU on this machine. ``problems`` is empty when checkpointing can work here."""

    path: str
    version: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A dump or restore that a former supervisor did not finish. Its unit must be killed."""

    model: str
    unit: str
    operation: str  # "dump" or "restore"
    shm: tuple[str, ...] = ()  # names in /dev/shm to remove once the unit was killed


class Checkpointer(Protocol):
    """CRIU images of engine trees: made, kept, trusted only when whole, restored into new units."""

    async def check(self) -> CriuFacts:
        """Probe the installed CRIU, until it works. Never raises."""

    async def recover(self) -> Sequence[Interrupted]:
        """Call once at start, before anything else. Removes unfinished images and their files in
        /dev/shm, ends a CRIU still running, and returns the units that must be killed. A restore
        is returned again by each supervisor until ``confirm_restore``."""

    async def obstacle(
        self, handle: UnitHandle, suspendable: Collection[int] | None = None
    ) -> str | None:
        """What of the running engine will prevent a dump, with its remedy, but for GPU devices of
        the processes that are ``suspendable`` (None: that is not known), since a CUDA suspend
        closes those; None when nothing is seen. Raises nothing for a tree that is gone."""

    async def precheck(self, handle: UnitHandle) -> int:
        """Estimated bytes of a dump. Raises CheckpointFailed naming process, descriptor and
        remedy when the tree cannot be dumped, Unsupported when CRIU cannot, or without the disk."""

    async def check_room(self, model: str, needed_bytes: int) -> None:
        """CheckpointFailed, which touched nothing, where an image of that size has no place."""

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        """The image is complete on disk, every process of the tree was seen gone, the former image
        of the model is replaced. Raises CheckpointFailed, whose tree and blame say what is
        left and what may be tried. Not interruptible: cancelled, it first ends under its
        deadline."""

    def take_removed(self) -> Sequence[str]:
        """Models whose images were removed since the last call, to make room for others."""

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        """The model's image when it is whole, safe to use and made for just this; ``path`` is the
        configured checkpoint_path."""

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        """The image is in the page cache and its checksums hold. May be cancelled. A restore begun
        meanwhile takes over what was verified."""

    async def restore(
        self,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        reserve_bytes: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        """The tree lives again in a new unit, every process seen with its old pid and name, the
        image verified. ``launch`` is the engine's as today: unit properties and output files count.
        ``reserve_bytes``: host memory that must stay free beside it. ``progress`` receives the
        bytes read and verified. Raises CheckpointFailed after removing everything it made; its
        blame is IMAGE (quarantine it) or HOST (pid or port taken, no memory: it may serve later).
        Cancelled, it leaves nothing either. Until ``confirm_restore`` the restore counts as under
        way."""

    async def confirm_restore(self, model: str) -> None:
        """The restored engine is in use or was killed: the next supervisor's ``recover`` must not
        end it."""

    async def quarantine(self, image: Image, reason: str) -> str:
        """Put the image out of use, kept with its logs; returns its new path."""

    async def discard(self, model: str) -> None:
        """Remove the model's image."""

    async def adopt(self, model: str, identity: Mapping[str, str]) -> Image:
        """Put an image that arrived from another host in the place of the model's own. Raises
        CheckpointFailed when it is not whole, not safe or not made for ``identity``."""

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        """Files in /dev/shm that are open in this unit only."""

    async def free_shm(self, model: str) -> None:
        """The model gets an engine that is not restored: names in /dev/shm that are held for its
        image are free for that."""

    async def remove_shm(self, model: str, names: Sequence[str]) -> None:
        """Unlink exactly these names; call after the model's processes are dead. Names that an
        image needs are held from then on, so that no other user can take them."""

    async def images(self) -> Sequence[Image]:
        """All complete images; their pages are not read."""
