"""Dumper: process trees to disk and back, with CRIU's command line. See ports.Dumper for the
contract.

CRIU runs with an empty plugin directory: the CUDA state is in host memory before it is called.
Every distribution's CRIU since 4.1 serves. Owner of the images' state is the file system
(images.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Event
from typing import Final

from llmux.drivers import criu_cli, criu_shm
from llmux.drivers.criu_dump import Dump, Tools, to_its_end
from llmux.drivers.criu_restore import Restore
from llmux.drivers.criu_tree import PROC, SHM, TreeFacts, inspect
from llmux.drivers.images import ImageStore
from llmux.drivers.images_files import Stopped, digest_files, fetch, first_difference
from llmux.drivers.images_manifest import Manifest, ManifestError
from llmux.drivers.run import run
from llmux.errors import CheckpointFailed, DriverError, Unsupported
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
    UnitManager,
)

log = logging.getLogger(__name__)

_CHECK_TIMEOUT: Final = 20.0
_END_TIMEOUT: Final = 5.0  # seconds from SIGKILL to the end of a CRIU that writes to a slow disk
_EMPTY: Final = ".no-plugins"


def _nothing(_phase: DumpPhase, _done: int, _total: int) -> None:
    pass


class _Check:
    """The checksums of one image being compared; shared by a read-ahead and a restore."""

    def __init__(self, manifest: Manifest, path: str, progress: Progress) -> None:
        self.users = 0
        self.stop = Event()
        self._loop = asyncio.get_running_loop()
        self._done = 0
        self._total = sum(file.size for file in manifest.files)
        self.progress = progress
        self.task = asyncio.ensure_future(asyncio.to_thread(self._work, manifest, path))

    def _work(self, manifest: Manifest, path: str) -> str | None:
        names = [file.name for file in manifest.files]
        try:
            have = digest_files(path, names, punch=False, stop=self.stop, count=self._count)
        except OSError as error:
            return f"the image cannot be read: {error}"
        damage = first_difference(manifest.files, have)
        return None if damage is None else f"the image is damaged: {damage}"

    def _count(self, size: int) -> None:
        self._done += size
        self._loop.call_soon_threadsafe(self._tell, self._done)

    def _tell(self, done: int) -> None:
        self.progress(DumpPhase.PACK, done, self._total)


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
        self._facts: CriuFacts | None = None
        self._dump_lock = asyncio.Lock()
        self._checks: dict[str, _Check] = {}
        self._verified: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._in_use: set[str] = set()

    # ---- what there is --------------------------------------------------------------------------

    async def check(self) -> CriuFacts:
        if self._facts is None:
            self._facts = await self._probe()
        return self._facts

    async def _probe(self) -> CriuFacts:
        path = shutil.which(self._criu_path)
        if path is None:
            return CriuFacts(self._criu_path, "", (f"{self._criu_path} is not installed",))
        problems = []
        try:
            version_text = (await run([path, "--version"], _CHECK_TIMEOUT)).stdout
            help_text = (await run([path, "--help"], _CHECK_TIMEOUT)).stdout
            checked = await run([path, "check"], _CHECK_TIMEOUT)
        except DriverError as error:
            return CriuFacts(path, "", (str(error),))
        version = criu_cli.parse_version(version_text)
        shown = ".".join(map(str, version))
        if version < criu_cli.OLDEST:
            oldest = ".".join(map(str, criu_cli.OLDEST))
            problems.append(f"{path} is version {shown or 'unknown'}, {oldest} or later is needed")
        problems += [
            f"{path} does not know {option}"
            for option in criu_cli.missing_features(help_text, criu_cli.WANTED)
        ]
        if checked.code != 0:
            text = criu_cli.excerpt(checked.stderr + checked.stdout) or checked.excerpt
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
            await asyncio.to_thread(os.makedirs, libdir, 0o700, exist_ok=True)
        return Tools(
            criu=facts.path,
            version=facts.version,
            libdir=libdir,
            proc=self._proc,
            shm=self._shm,
            cgroup_root=self._cgroup_root,
        )

    # ---- making ---------------------------------------------------------------------------------

    async def _inspect(self, handle: UnitHandle) -> TreeFacts:
        members = list(await self._units.pids(handle))
        tree = await asyncio.to_thread(inspect, handle.pid, members, proc=self._proc, shm=self._shm)
        target = f'model "{handle.model}"'
        if tree is None:
            raise CheckpointFailed("checkpoint", target, "its root process is gone", tree="gone")
        if tree.problems:
            first = tree.problems[0]
            more = f" (and {len(tree.problems) - 1} more)" if len(tree.problems) > 1 else ""
            raise CheckpointFailed(
                "checkpoint",
                target,
                first.text + more,
                hint=first.remedy,
                tree="running",
                problems=tuple(problem.text for problem in tree.problems),
            )
        return tree

    async def precheck(self, handle: UnitHandle) -> int:
        await self._tools("checkpoint", handle.model)
        tree = await self._inspect(handle)
        await asyncio.to_thread(self._store.check_room, handle.model, tree.resident_bytes)
        return tree.resident_bytes

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        return await to_its_end(self._dump(handle, spec, deadline, progress or _nothing))

    async def _dump(
        self, handle: UnitHandle, spec: DumpSpec, deadline: float, progress: Progress
    ) -> Image:
        started = time.monotonic()
        progress(DumpPhase.CHECK, 0, 0)
        tools = await self._tools("checkpoint", handle.model)
        tree = await self._inspect(handle)
        await asyncio.to_thread(self._store.check_room, handle.model, tree.resident_bytes)
        left = deadline - (time.monotonic() - started)
        dump = Dump(tools, self._store, handle, spec, tree, progress, left)
        image = await dump.run(self._dump_lock)
        # Its bytes were just summed up as they lie in the page cache.
        self._verified[image.path] = await asyncio.to_thread(self._stamps, image.path)
        spared = frozenset({image.model, *self._in_use})
        for model in await asyncio.to_thread(self._store.enforce_budget, spared):
            log.info('removed the image of model "%s": checkpoint.max_bytes is reached', model)
        return image

    # ---- finding and using ----------------------------------------------------------------------

    async def find(
        self, model: str, identity: Mapping[str, str], path: str | None = None
    ) -> Image | NoImage:
        return await asyncio.to_thread(self._store.find, model, identity, path)

    async def read_ahead(self, image: Image, progress: Progress | None = None) -> None:
        if await self._is_verified(image):
            # Summing it up once more would take processors from the restore that comes next.
            await asyncio.to_thread(fetch, image.path)
            return
        damage = await self._verify(image, progress or _nothing)
        if damage is not None:
            raise CheckpointFailed(
                "read", f'the image of model "{image.model}"', damage, blame="image"
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
                check = self._checks[image.path] = _Check(manifest, image.path, progress)
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
        spare: int = 0,
        progress: Progress | None = None,
    ) -> UnitHandle:
        tools = await self._tools("restore", image.model)
        self._in_use.add(image.model)
        verified = asyncio.ensure_future(self._trusted(image, progress or _nothing))
        try:
            work = Restore(tools, self._store, self._units, image, launch, deadline, spare)
            return await work.run(verified)
        except BaseException:
            self._in_use.discard(image.model)
            raise
        finally:
            verified.cancel()

    async def settle(self, model: str) -> None:
        self._in_use.discard(model)
        await asyncio.to_thread(self._store.settle, model)

    # ---- losing ---------------------------------------------------------------------------------

    async def quarantine(self, image: Image, reason: str) -> str:
        self._verified.pop(image.path, None)
        return await asyncio.to_thread(self._store.quarantine, image, reason)

    async def discard(self, model: str) -> None:
        await asyncio.to_thread(self._store.discard, model)

    async def images(self) -> Sequence[Image]:
        return await asyncio.to_thread(self._store.images)

    async def recover(self) -> Sequence[Interrupted]:
        return await asyncio.to_thread(self._recover)

    def _recover(self) -> list[Interrupted]:
        interrupted = []
        for model, path, note in self._store.sweep():
            self._end_criu(path)
            if note:
                inodes = [(int(device), int(inode)) for device, inode in note.get("shm", ())]
                groups = criu_shm.find_names(inodes, self._shm)
                names = [name for group in groups.values() for name in group]
                names += [str(name) for name in note.get("names", ())]
                links = [name for name in names if name.startswith("link_remap.")]
                criu_shm.remove(links, self._shm)
                criu_shm.remove_litter(note.get("litter", ()), self._shm, self._proc)
                # The unit may live; what its processes use goes when it has been killed.
                rest = tuple(sorted(set(names) - set(links)))
                found = Interrupted(model, str(note["unit"]), str(note["operation"]), rest)
                interrupted.append(found)
                if found.operation == "restore":
                    continue  # its note stays until the unit was killed: see settle
            self._store.forget(path)
        return interrupted

    def _end_criu(self, path: str) -> None:
        """Kill a CRIU that still dumps into ``path``: its supervisor is gone, the image is lost."""
        for name in filter(str.isdigit, os.listdir(self._proc)):
            with suppress(OSError):
                with open(f"{self._proc}/{name}/cmdline", "rb") as file:
                    arguments = file.read().split(b"\0")
                if os.fsencode(path) not in arguments or b"dump" not in arguments:
                    continue
                pidfd = os.pidfd_open(int(name))
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], _END_TIMEOUT)
                finally:
                    os.close(pidfd)

    async def shm_names(self, handle: UnitHandle) -> Sequence[str]:
        """Names in /dev/shm of what the unit's processes have open there; to be removed by
        ``remove_shm`` once they were killed, as nobody else does."""

        def look(members: Sequence[int]) -> list[str]:
            tree = inspect(handle.pid, members, proc=self._proc, shm=self._shm)
            found = criu_shm.find_names(tree.shm if tree else (), self._shm)
            return [name for group in found.values() for name in group]

        return await asyncio.to_thread(look, await self._units.pids(handle))

    async def remove_shm(self, names: Sequence[str]) -> None:
        await asyncio.to_thread(criu_shm.remove, names, self._shm)
