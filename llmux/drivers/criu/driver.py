"""image_ports.Checkpointer with CRIU's command line: process trees to disk and back.

CRIU runs with an empty plugin directory: the CUDA state is in host memory before it is called.
Every distribution's CRIU since 4.1 serves. Owner of the images' state is the file system
(images/store.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from llmux.drivers.criu import command, shm
from llmux.drivers.criu.dump import Dump
from llmux.drivers.criu.held_names import HeldNames
from llmux.drivers.criu.restore import Restore
from llmux.drivers.criu.tools import Tools, end_dump, finish_despite_cancellation
from llmux.drivers.criu.tree import PROC, SHM, TreeFacts, inspect
from llmux.drivers.images.checksums import ImageCheck
from llmux.drivers.images.files import Stopped, fetch
from llmux.drivers.images.manifest import ManifestError
from llmux.drivers.images.notes import Begun
from llmux.drivers.images.room import ImageRoom
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.run import run
from llmux.errors import Blame, CheckpointFailed, DriverError, TreeState, Unsupported
from llmux.image_ports import CriuFacts, DumpPhase, DumpSpec, Image, Interrupted, NoImage, Progress
from llmux.ports import LaunchSpec, UnitHandle, UnitManager
from llmux.trusted import USE_OWN_DIRECTORY, make_private
from llmux.typed_json import BadJson

log = logging.getLogger(__name__)

_CHECK_TIMEOUT: Final = 20.0
_EMPTY: Final = ".no-plugins"


def _nothing(_phase: DumpPhase, _done: int, _total: int) -> None:
    pass


class Criu:
    """``cuda_plugin_dir``: CRIU's own CUDA plugin instead of ours; never both."""

    def __init__(
        self,
        units: UnitManager,
        store: ImageStore,
        images_dir: str,
        *,
        criu_path: str = "criu",
        cuda_plugin_dir: str | None = None,
        cgroup_root: str = "/sys/fs/cgroup",
        proc: str = PROC,
        shm: str = SHM,
    ) -> None:
        self._units = units
        self._store = store
        self._images_dir = os.path.abspath(images_dir)
        self._criu_path = criu_path
        self._plugin_dir = cuda_plugin_dir
        self._cgroup_root = cgroup_root
        self._proc = proc
        self._shm = shm
        self._held = HeldNames(store, shm)
        self._facts: CriuFacts | None = None
        self._dump_lock = asyncio.Lock()
        self._checks: dict[str, ImageCheck] = {}
        self._verified: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._room = ImageRoom(store)

    # ---- probing --------------------------------------------------------------------------------

    async def check(self) -> CriuFacts:
        if self._facts is None or self._facts.problems:  # it may have been installed since
            self._facts = await self._probe()
        return self._facts

    async def _probe(self) -> CriuFacts:
        path = shutil.which(self._criu_path)
        if path is None:
            return CriuFacts(self._criu_path, "", (f"{self._criu_path} is not installed",))
        problems = []
        try:
            told = await run([path, "--version"], _CHECK_TIMEOUT)
            if told.code != 0:  # a library that is missing or too old, mostly
                return CriuFacts(path, "", (f"`{path} --version` fails: {told.excerpt}",))
            help_text = (await run([path, "--help"], _CHECK_TIMEOUT)).stdout
            checked = await run([path, "check"], _CHECK_TIMEOUT)
        except DriverError as error:
            return CriuFacts(path, "", (str(error),))
        version = command.parse_version(told.stdout)
        shown = ".".join(map(str, version))
        if version < command.OLDEST:
            oldest = ".".join(map(str, command.OLDEST))
            problems.append(f"{path} is version {shown or 'unknown'}, {oldest} or later is needed")
        problems += [
            f"{path} does not know {option}"
            for option in command.missing_features(help_text, command.WANTED)
        ]
        if checked.code != 0:
            text = command.excerpt(checked.stderr + checked.stdout) or checked.excerpt
            problems.append(f"`{path} check` fails: {text}")
        return CriuFacts(path, shown, tuple(problems))

    async def _tools(self, operation: str, model: str) -> Tools:
        facts = await self.check()
        if facts.problems:
            raise Unsupported(
                operation,
                f'model "{model}"',
                "; ".join(facts.problems),
                hint="install CRIU 4.1 or later, or park this model another way",
            )
        libdir = self._plugin_dir
        if libdir is None:
            libdir = os.path.join(self._images_dir, _EMPTY)
            await asyncio.to_thread(self._make_plugin_dir, libdir, operation, model)
        return Tools(
            criu=facts.path,
            version=facts.version,
            libdir=libdir,
            proc=self._proc,
            shm=self._shm,
            held=self._held,
            cgroup_root=self._cgroup_root,
        )

    @staticmethod
    def _make_plugin_dir(path: str, operation: str, model: str) -> None:
        """CRIU loads every library in it as root."""
        try:
            make_private(path)
        except OSError as error:
            target = f'model "{model}"'
            raise Unsupported(operation, target, str(error), hint=USE_OWN_DIRECTORY) from error

    # ---- making ---------------------------------------------------------------------------------

    async def _inspect(self, handle: UnitHandle) -> TreeFacts:
        members = list(await self._units.pids(handle))
        tree = await asyncio.to_thread(inspect, handle.pid, members, proc=self._proc, shm=self._shm)
        target = f'model "{handle.model}"'
        if tree is None:
            raise CheckpointFailed(
                "checkpoint",
                target,
                "its root process is gone",
                tree=TreeState.GONE,
                blame=Blame.ENGINE,
            )
        if tree.problems:
            first = tree.problems[0]
            more = f" (and {len(tree.problems) - 1} more)" if len(tree.problems) > 1 else ""
            raise CheckpointFailed(
                "checkpoint",
                target,
                first.text + more,
                hint=first.remedy,
                tree=TreeState.RUNNING,
                blame=Blame.ENGINE,
                problems=tuple(problem.text for problem in tree.problems),
            )
        return tree

    async def require(self, model: str) -> None:
        """Raises Unsupported, naming what is missing, when CRIU cannot work here."""
        await self._tools("checkpoint", model)

    async def obstacle(
        self, handle: UnitHandle, suspendable: Collection[int] | None = None
    ) -> str | None:
        members = list(await self._units.pids(handle))
        tree = await asyncio.to_thread(inspect, handle.pid, members, proc=self._proc, shm=self._shm)
        found = [
            problem
            for problem in (tree.problems if tree else ())
            if problem.gpu_user is None
            or (suspendable is not None and problem.gpu_user not in suspendable)
        ]
        return f"{found[0].text}; {found[0].remedy}" if found else None

    async def precheck(self, handle: UnitHandle) -> int:
        await self._tools("checkpoint", handle.model)
        tree = await self._inspect(handle)
        await self.check_room(handle.model, tree.resident_bytes)
        return tree.resident_bytes

    async def check_room(self, model: str, needed_bytes: int) -> None:
        await self._room.check(model, needed_bytes)

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        return await finish_despite_cancellation(
            self._dump(handle, spec, deadline, progress or _nothing)
        )

    async def _dump(
        self, handle: UnitHandle, spec: DumpSpec, deadline: float, progress: Progress
    ) -> Image:
        started = time.monotonic()
        progress(DumpPhase.CHECK, 0, 0)
        tools = await self._tools("checkpoint", handle.model)
        tree = await self._inspect(handle)
        await self._room.make(handle.model, tree.resident_bytes, spec.cold_seconds)
        left = deadline - (time.monotonic() - started)
        dump = Dump(tools, self._store, handle, spec, tree, progress, left)
        whole = False
        try:
            image = await dump.run(self._dump_lock)
            whole = True
        finally:
            await asyncio.to_thread(self._held.published, handle.model, whole=whole)
        # Its bytes were just checksummed in the page cache.
        self._verified[image.path] = await asyncio.to_thread(self._stamps, image.path)
        await self._enforce({image.model})
        return image

    async def _enforce(self, spared: Collection[str]) -> None:
        await self._room.enforce(spared)
        await asyncio.to_thread(self._held.settle)

    def take_removed(self) -> Sequence[str]:
        return self._room.take_removed()

    # ---- finding and using ----------------------------------------------------------------------

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        return await asyncio.to_thread(self._store.find, model, identity, path)

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        self._room.expect(image.model)
        if await self._is_verified(image):
            # A second checksum would take processors from the restore that comes next.
            await asyncio.to_thread(fetch, image.path)
            return
        damage = await self._verify(image, progress or _nothing)
        if damage is not None:
            raise CheckpointFailed(
                "read", f'the image of model "{image.model}"', damage, blame=Blame.IMAGE
            )

    async def _verify(self, image: Image, progress: Progress) -> str | None:
        """What is wrong with the image's bytes. Reading them is also what fills the page cache."""
        check = self._checks.get(image.path)
        if check is None:
            try:
                manifest = await asyncio.to_thread(self._store.load, image.path)
            except ManifestError as error:
                return str(error)
            stamps = await asyncio.to_thread(self._stamps, image.path)
            check = self._checks.get(image.path)
            if check is None:
                check = self._checks[image.path] = ImageCheck(manifest, image.path, progress)
        else:
            stamps = ()
        if progress is not _nothing:
            check.progress = progress
        check.users += 1
        try:
            damage = await asyncio.shield(check.task)
        except Stopped:
            return "its checksums were interrupted"
        finally:
            check.users -= 1
            if check.users == 0:
                check.stop.set()
                if self._checks.get(image.path) is check:
                    del self._checks[image.path]
                check.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if damage is None and stamps:
            self._verified[image.path] = stamps
        return damage

    def _stamps(self, path: str) -> tuple[tuple[int, ...], ...]:
        """Changes when any file of the image is written to, replaced or touched."""
        stamps = []
        for root, _, files in os.walk(path):
            for name in sorted(files):
                status = os.lstat(os.path.join(root, name))
                stamps.append(
                    (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                )
        return tuple(stamps)

    async def _is_verified(self, image: Image) -> bool:
        """By us, and not touched since."""
        known = self._verified.get(image.path)
        return known is not None and known == await asyncio.to_thread(self._stamps, image.path)

    async def _trusted(self, image: Image, progress: Progress) -> str | None:
        """Nothing, at once, when the image was verified by us and not touched since."""
        if image.path not in self._checks and await self._is_verified(image):
            return None
        return await self._verify(image, progress)

    async def restore(
        self,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        reserve_bytes: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        tools = await self._tools("restore", image.model)
        self._room.in_use.add(image.model)
        verified = asyncio.ensure_future(self._trusted(image, progress or _nothing))
        try:
            work = Restore(tools, self._store, self._units, image, launch, deadline, reserve_bytes)
            return await work.run(verified)
        except BaseException:
            self._room.in_use.discard(image.model)
            raise
        finally:
            verified.cancel()

    async def confirm_restore(self, model: str) -> None:
        self._room.restored(model)
        await asyncio.to_thread(self._store.confirm_restore, model)

    # ---- losing ---------------------------------------------------------------------------------

    async def quarantine(self, image: Image, reason: str) -> str:
        self._verified.pop(image.path, None)
        path = await asyncio.to_thread(self._store.quarantine, image, reason)
        await asyncio.to_thread(self._held.settle)
        return path

    async def discard(self, model: str) -> None:
        await asyncio.to_thread(self._store.discard, model)
        await asyncio.to_thread(self._held.settle)

    async def adopt(self, model: str, identity: Mapping[str, str]) -> Image:
        image = await asyncio.to_thread(self._store.adopt, model, identity)
        self._verified.pop(image.path, None)
        await self._enforce({model})
        return image

    async def images(self) -> Sequence[Image]:
        return await asyncio.to_thread(self._store.images)

    async def recover(self) -> Sequence[Interrupted]:
        interrupted = await asyncio.to_thread(self._recover)
        await self._room.enforce({found.model for found in interrupted})  # it may be less now
        alive = [handle.model for handle in await self._units.observe()]
        await asyncio.to_thread(self._held.recover, alive)
        return interrupted

    def _recover(self) -> list[Interrupted]:
        interrupted = []
        for model, path, note in self._store.sweep():
            end_dump(path, self._proc)
            try:
                found = self._clean_up(model, Begun.of(note)) if note else None
            except (OSError, BadJson) as error:
                log.warning("cannot use the note %s, and go on without it: %s", path, error)
                found = None
            if found is not None:
                interrupted.append(found)
                if found.operation == "restore":
                    continue  # its note stays until the unit was killed: see confirm_restore
            self._store.forget(path)
        return interrupted

    def _clean_up(self, model: str, begun: Begun) -> Interrupted:
        groups = shm.find_names(begun.shm, self._shm)
        names = [name for group in groups.values() for name in group]
        names += begun.names
        links = [name for name in names if name.startswith("link_remap.")]
        shm.remove(links, self._shm)
        shm.remove_leftovers(begun.leftovers, begun.uid, self._shm, self._proc)
        # The unit may live; what its processes use goes when it has been killed.
        rest = tuple(sorted(set(names) - set(links)))
        return Interrupted(model, begun.unit, begun.operation, rest)

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        def look(members: Sequence[int]) -> list[str]:
            tree = inspect(handle.pid, members, proc=self._proc, shm=self._shm)
            found = shm.find_names(tree.shm if tree else (), self._shm)
            return [name for group in found.values() for name in group]

        return await asyncio.to_thread(look, await self._units.pids(handle))

    async def free_shm(self, model: str) -> None:
        await asyncio.to_thread(self._held.begin, model)

    async def remove_shm(self, model: str, names: Sequence[str]) -> None:
        await asyncio.to_thread(self._held.end, model, names)
