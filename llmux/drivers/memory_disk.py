"""Twins of what outlives a process: checkpoint images and the notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmux.drivers.memory import GIB, World
from llmux.drivers.spawn import unit_name
from llmux.errors import CheckpointFailed, DriverError, StateFileError
from llmux.ports import (
    CriuFacts,
    DumpPhase,
    DumpSpec,
    Image,
    Interrupted,
    LaunchSpec,
    NoImage,
    Progress,
    UnitHandle,
)


class MemoryDumper:
    """Twin of the CRIU driver: one image per model, on a disk without limits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.interrupted: list[Interrupted] = []

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        return ()

    async def remove_shm(self, names: Sequence[str]) -> None:
        assert not names, "the twin's engines have nothing in /dev/shm"

    async def check(self) -> CriuFacts:
        self._world.record("dumper.check", "")
        return CriuFacts("/usr/sbin/criu", "4.2.1", ())

    async def recover(self) -> Sequence[Interrupted]:
        await self._world.act("dumper.recover", "")
        found, self.interrupted = self.interrupted, []
        for model in sorted(self._world.restoring):
            found.append(Interrupted(model, unit_name(model), "restore"))
        return found

    async def precheck(self, handle: UnitHandle) -> int:
        await self._world.act("dumper.precheck", handle.model)
        return 1 * GIB

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
            raise CheckpointFailed("dump", target, "its processes are gone", tree="gone")
        if engine.held and not engine.suspended and self._world.gpu_bytes:
            self._world.violate(f"dump of {handle.model} with memory on a GPU")
        if engine.frozen and not spec.frozen:
            self._world.violate(f"dump of {handle.model}, which is frozen, as if it ran")
        try:
            await self._world.act("dumper.dump", handle.model, spec)
        except DriverError as error:
            error.fields.setdefault("tree", "running")
            raise
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

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        self._world.record("dumper.find", model)
        image = self._world.images.get(model)
        if image is None:
            return NoImage(f'there is no image of model "{model}"')
        for key in sorted({*identity, *image.identity}):
            if identity.get(key) != image.identity.get(key):
                return NoImage(f"{key} differs")
        return image

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        await self._world.act("dumper.read_ahead", image.model)

    async def restore(
        self,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        spare: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        target = f'model "{image.model}"'
        if self._world.memory_bytes < image.apparent_bytes + spare:
            raise CheckpointFailed("restore", target, "not enough memory", blame="host")
        self._world.restoring.add(image.model)
        if progress is not None:
            progress(DumpPhase.PACK, image.apparent_bytes, image.apparent_bytes)
        try:
            return await self._restore(image, launch)
        except BaseException:
            self._world.restoring.discard(image.model)
            raise

    async def settle(self, model: str) -> None:
        await self._world.act("dumper.settle", model)
        self._world.restoring.discard(model)

    async def _restore(self, image: Image, launch: LaunchSpec) -> UnitHandle:
        target = f'model "{image.model}"'
        await self._world.act("dumper.restore", image.model, launch)
        engine = self._world.dumped.get(image.path)
        if engine is None:
            raise CheckpointFailed("restore", target, "the image is not complete", blame="image")
        if image.model in self._world.engines:
            raise CheckpointFailed("restore", target, "its pid is taken", blame="host")
        fresh = self._world.new_handle(image.model)
        handle = replace(fresh, pid=image.root_pid)  # CRIU gives every process its old pid
        self._world.engines[image.model] = replace(
            engine, handle=handle, frozen=False, held=dict(engine.held), asleep=set(engine.asleep)
        )
        return handle

    async def quarantine(self, image: Image, reason: str) -> str:
        await self._world.act("dumper.quarantine", image.model, reason)
        self._world.images.pop(image.model, None)
        return f"{image.path}.quarantine"

    async def discard(self, model: str) -> None:
        await self._world.act("dumper.discard", model)
        self._world.images.pop(model, None)

    async def images(self) -> Sequence[Image]:
        return list(self._world.images.values())


class MemoryStore:
    """Twin of FileStateStore. ``broken`` makes it unreadable until the next save."""

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        self.document: Mapping[str, Any] = dict(document or {})
        self.broken: str | None = None
        self.saves = 0

    def load(self) -> Mapping[str, Any]:
        if self.broken is not None:
            raise StateFileError(f"cannot read the state file (memory): {self.broken}")
        return dict(self.document)

    def save(self, document: Mapping[str, Any]) -> None:
        self.document = dict(document)
        self.broken = None
        self.saves += 1
