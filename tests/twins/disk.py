"""Twins of what outlives a process: checkpoint images and the notes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmux.drivers.processes.spawn import unit_name
from llmux.errors import Blame, CheckpointFailed, StateFileError, TreeState
from llmux.image_ports import (
    NONE_MADE,
    CriuFacts,
    DumpPhase,
    DumpSpec,
    Image,
    Interrupted,
    NoImage,
    Progress,
)
from llmux.ports import LaunchSpec, UnitHandle
from tests.twins.world import GIB, World


class MemoryCheckpointer:
    """Twin of the CRIU driver: one image per model, on a disk without limits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.interrupted: list[Interrupted] = []
        self.removed: list[str] = []  # models whose images went to make room

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        return ()

    async def free_shm(self, model: str) -> None:
        if model in self._world.engines:
            self._world.violate(f"names of {model} are freed while it has an engine")

    async def remove_shm(self, model: str, names: Sequence[str]) -> None:
        assert not names, "the twin's engines have nothing in /dev/shm"

    async def check(self) -> CriuFacts:
        self._world.record("checkpointer.check", "")
        return CriuFacts("/usr/sbin/criu", "4.2.1", self._world.criu_problems)

    async def recover(self) -> Sequence[Interrupted]:
        await self._world.act("checkpointer.recover", "")
        found, self.interrupted = self.interrupted, []
        for model in sorted(self._world.restoring):
            found.append(Interrupted(model, unit_name(model), "restore"))
        return found

    async def obstacle(
        self, handle: UnitHandle, suspendable: Collection[int] | None = None
    ) -> str | None:
        await self._world.act("checkpointer.obstacle", handle.model, suspendable)
        return self._world.obstacles.get(handle.model)

    async def precheck(self, handle: UnitHandle) -> int:
        await self._world.act("checkpointer.precheck", handle.model)
        return 1 * GIB

    async def check_room(self, model: str, needed_bytes: int) -> None:
        await self._world.act("checkpointer.check_room", model, needed_bytes)

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        target = f'model "{handle.model}"'
        self._world.busy(handle.model, "dump")
        engine = self._world.find(handle)
        if engine is None:
            raise CheckpointFailed(
                "dump", target, "its processes are gone", tree=TreeState.GONE, blame=Blame.ENGINE
            )
        if engine.held and not engine.suspended and self._world.gpu_bytes:
            self._world.violate(f"dump of {handle.model} with memory on a GPU")
        if engine.frozen and not spec.frozen:
            self._world.violate(f"dump of {handle.model}, which is frozen, as if it ran")
        await self._world.act("checkpointer.dump", handle.model, spec)
        del self._world.engines[handle.model]
        self._world.unwatch(handle)
        image = Image(
            model=handle.model,
            path=f"/images/{handle.model}/current",
            identity=dict(spec.identity),
            recipe=dict(spec.recipe),
            created=0.0,
            dump_seconds=1.0,
            root_pid=handle.pid,
            apparent_bytes=2 * GIB,
            disk_bytes=1 * GIB,
        )
        self._world.dumped[image.path] = engine
        self._world.images[handle.model] = image
        if progress is not None:
            progress(DumpPhase.RELEASED, 0, 0)
            progress(DumpPhase.DONE, image.disk_bytes, image.disk_bytes)
        return image

    def take_removed(self) -> Sequence[str]:
        removed, self.removed = self.removed, []
        return removed

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        await self._world.act("checkpointer.find", model)
        image = self._world.images.get(model)
        if image is None:
            return NoImage(NONE_MADE)
        for key in sorted({*identity, *image.identity}):
            if identity.get(key) != image.identity.get(key):
                return NoImage(f"{key} differs")
        return image

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        await self._world.act("checkpointer.read_ahead", image.model)

    async def restore(
        self,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        reserve_bytes: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        target = f'model "{image.model}"'
        if self._world.memory_bytes < image.apparent_bytes + reserve_bytes:
            raise CheckpointFailed("restore", target, "not enough memory", blame=Blame.HOST)
        self._world.restoring.add(image.model)
        if progress is not None:
            progress(DumpPhase.PACK, image.apparent_bytes, image.apparent_bytes)
        try:
            return await self._restore(image, launch)
        except BaseException:
            self._world.restoring.discard(image.model)
            raise

    async def confirm_restore(self, model: str) -> None:
        await self._world.act("checkpointer.confirm_restore", model)
        self._world.restoring.discard(model)

    async def _restore(self, image: Image, launch: LaunchSpec) -> UnitHandle:
        target = f'model "{image.model}"'
        await self._world.act("checkpointer.restore", image.model, launch)
        engine = self._world.dumped.get(image.path)
        if engine is None:
            raise CheckpointFailed(
                "restore", target, "the image is not complete", blame=Blame.IMAGE
            )
        if image.model in self._world.engines:
            raise CheckpointFailed("restore", target, "its pid is taken", blame=Blame.HOST)
        fresh = self._world.new_handle(image.model)
        handle = replace(fresh, pid=image.root_pid)  # CRIU gives every process its old pid
        self._world.engines[image.model] = replace(
            engine, handle=handle, frozen=False, held=dict(engine.held), asleep=set(engine.asleep)
        )
        return handle

    async def quarantine(self, image: Image, reason: str) -> str:
        await self._world.act("checkpointer.quarantine", image.model, reason)
        self._world.images.pop(image.model, None)
        return f"{image.path}.quarantine"

    async def discard(self, model: str) -> None:
        await self._world.act("checkpointer.discard", model)
        self._world.images.pop(model, None)

    async def adopt(self, model: str, identity: Mapping[str, str]) -> Image:
        """``world.arrived`` has the images that were put into models' directories."""
        await self._world.act("checkpointer.adopt", model)
        image = self._world.arrived.pop(model, None)
        if image is None:
            raise CheckpointFailed("import", f'the image of model "{model}"', "it does not exist")
        if dict(image.identity) != dict(identity):
            raise CheckpointFailed("import", f'the image of model "{model}"', "it does not fit")
        self._world.images[model] = image
        return image

    async def images(self) -> Sequence[Image]:
        return list(self._world.images.values())


class MemoryStore:
    """Twin of FileStateStore. ``broken`` makes it unreadable until the next save."""

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        self.document: Mapping[str, Any] = dict(document or {})
        self.broken: str | None = None
        self.aside: Mapping[str, Any] | None = None
        self.saves = 0

    def load(self) -> Mapping[str, Any]:
        if self.broken is not None:
            raise StateFileError(f"cannot read the state file (memory): {self.broken}")
        return dict(self.document)

    def save(self, document: Mapping[str, Any]) -> None:
        self.document = dict(document)
        self.broken = None
        self.saves += 1

    def put_aside(self, why: str) -> StateFileError:
        self.aside, self.document = self.document, {}
        return StateFileError(f"cannot read the state file (memory): {why}")


class MemoryEvents:
    """Twin of the events file; ``fails``: nothing can be written."""

    def __init__(self, *events: Mapping[str, Any]) -> None:
        self.lines = [json.dumps(event) for event in events]
        self.fails = False

    def load(self) -> Sequence[Mapping[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def append(self, event: Mapping[str, Any]) -> None:
        if self.fails:
            raise StateFileError("cannot write the events: no room")
        try:
            self.lines.append(json.dumps(event))
        except (TypeError, ValueError) as error:
            raise StateFileError(f"cannot write the events: {error}") from error
