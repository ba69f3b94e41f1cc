"""One dump: from a living tree to a complete image, or back to where it was.

What a failure leaves, found by killing CRIU at many moments (4.2.1, 2026-11): when CRIU itself
fails (disk full, something it cannot dump) the tree continues unharmed; when CRIU is *killed*,
threads may die in its injected code and TCP sockets stay in repair mode, so the tree must be
killed.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Event
from typing import Final, TypeVar

from llmux.drivers.criu import (
    command,
    held_names,
    image_format,
    known_files,
    shm,
    small_files,
    zero_pages,
)
from llmux.drivers.criu.tools import Tools, failed
from llmux.drivers.criu.tree import TreeFacts, read_status
from llmux.drivers.images.files import Stopped, digest_files, sizes_on_disk
from llmux.drivers.images.manifest import (
    KeptPath,
    KnownFile,
    Manifest,
    ShmGroup,
    SmallFile,
    TreeProcess,
)
from llmux.drivers.images.notes import DUMPING, write_note
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.run import run
from llmux.errors import Blame, CheckpointFailed, DriverTimeout, LlmuxError, TreeState
from llmux.image_ports import DumpPhase, DumpSpec, Image, Progress
from llmux.ports import UnitHandle

log = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_PART_OF_IT: Final = frozenset({f"{command.DUMP_LOG}.gz", DUMPING, "stats-dump"})
_LOOK_EVERY: Final = 0.25  # seconds between two progress reports
# The processes are gone by then: a late dump still gets this long to become an image.
_PACK_LEAST: Final = 30.0
_GONE_TIMEOUT: Final = 10.0  # from CRIU's SIGKILL to the last process reaped by its parent


class Dump:
    """State of one dump between its steps; used once."""

    def __init__(
        self,
        tools: Tools,
        store: ImageStore,
        handle: UnitHandle,
        spec: DumpSpec,
        tree: TreeFacts,
        progress: Progress,
        deadline: float,
    ) -> None:
        self._tools = tools
        self._store = store
        self._handle = handle
        self._spec = spec
        self._tree = tree
        self._progress = progress
        self._end = time.monotonic() + deadline
        self._directory = ""
        self._processes: tuple[TreeProcess, ...] = tree.processes
        self._shm: tuple[ShmGroup, ...] = ()
        self._known: tuple[KnownFile, ...] = ()
        self._small: tuple[SmallFile, ...] = ()

    async def run(self, lock: asyncio.Lock) -> Image:
        """``lock``: CRIU's ``link_remap.N`` in /dev/shm have the same names in every dump, so
        dumps go one at a time until those are renamed."""
        model = self._handle.model
        self._directory = await asyncio.to_thread(self._store.begin, model)
        started = time.monotonic()
        try:
            async with lock:
                self._end += time.monotonic() - started  # another dump's time is not ours
                try:
                    held = await asyncio.to_thread(
                        known_files.record, self._tree.pids, self._tools.proc, self._tools.shm
                    )
                    places = small_files.own_directories(self._spec.launch.env)
                    small = await asyncio.to_thread(
                        small_files.find, self._tree.pids, places, self._tools.proc
                    )
                    await self._dump_despite_links()
                    await self._see_them_gone()
                    self._progress(DumpPhase.RELEASED, 0, 0)
                    await asyncio.to_thread(self._take_shm)
                    self._small = await asyncio.to_thread(small_files.keep, small, self._directory)
                    self._known = await asyncio.to_thread(self._complete_record, held)
                finally:
                    # Also after a failure: links that a killed CRIU left are ours to remove.
                    await asyncio.to_thread(self._remove_shm)
            seconds = time.monotonic() - started
            return await self._pack_in_time(seconds)
        except (OSError, image_format.BadImage, LlmuxError) as error:
            await asyncio.to_thread(self._store.abandon, self._directory, command.DUMP_LOG)
            if isinstance(error, LlmuxError):
                raise
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space in checkpoint.images_dir" if full else None
            # Only what follows the end of the processes raises these.
            raise failed("checkpoint", model, str(error), hint, tree=TreeState.GONE) from error

    # ---- CRIU -----------------------------------------------------------------------------------

    async def _dump_despite_links(self) -> None:
        """Links that a killed CRIU of others left are set aside: they may be needed, but not under
        these names by what runs now."""
        try:
            await self._dump()
        except CheckpointFailed as error:
            if command.LINKS_TAKEN not in str(error) or error.tree is not TreeState.RUNNING:
                raise
            token = os.path.basename(self._directory).rpartition("-")[2]
            shm_dir, proc = self._tools.shm, self._tools.proc
            moved, used = await asyncio.to_thread(shm.set_aside_links, token, shm_dir, proc)
            if not moved:
                error.hint = f"{'; '.join(used)}: end it" if used else error.hint
                raise
            log.warning(
                "%s, left by another CRIU, stood in the way of the image of %s: now *.aside-%s",
                ", ".join(moved),
                self._handle.model,
                token,
                extra={"model": self._handle.model},
            )
            await asyncio.to_thread(self._store.abandon, self._directory, command.DUMP_LOG)
            self._directory = await asyncio.to_thread(self._store.begin, self._handle.model)
            await self._dump()

    async def _dump(self) -> None:
        model, root = self._handle.model, self._handle.pid
        note = {
            "unit": self._handle.unit,
            "operation": "dump",
            "shm": sorted(map(list, self._tree.shm)),
        }
        await asyncio.to_thread(write_note, os.path.join(self._directory, DUMPING), note)
        cgroup = None
        if self._spec.frozen and self._handle.cgroup is not None:
            cgroup = f"{self._tools.cgroup_root}{self._handle.cgroup}/engine"
        argv = command.dump_arguments(
            self._tools.criu, root, self._directory, self._tools.libdir, cgroup
        )
        left = max(self._end - time.monotonic(), 0.001)
        task = asyncio.ensure_future(run(argv, left))
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_EVERY)
            with suppress(OSError):
                have, _ = await asyncio.to_thread(sizes_on_disk, self._directory)
                self._progress(DumpPhase.DUMP, have, self._tree.resident_bytes)
        try:
            result = task.result()
        except DriverTimeout as error:
            raise failed(
                "checkpoint",
                model,
                f"CRIU was not done after {left:.0f}s and was killed",
                "the engine is broken by that and must be killed; is the disk slow?",
                tree=TreeState.BROKEN,
            ) from error
        log = await asyncio.to_thread(self._read_log)
        if result.code == 0 and command.succeeded(log, "dump"):
            return
        text = command.excerpt(log) or result.excerpt or f"CRIU ended with status {result.code}"
        if result.code < 0:
            text = f"CRIU was killed by signal {-result.code}"
        tree = TreeState.BROKEN if result.code < 0 else await asyncio.to_thread(self._state_of_tree)
        host = result.code < 0 or command.blames_host(text)
        raise failed(
            "checkpoint",
            model,
            text,
            command.hint_for(text),
            tree=tree,
            blame=Blame.HOST if host else Blame.ENGINE,
        )

    def _read_log(self) -> str:
        try:
            path = os.path.join(self._directory, command.DUMP_LOG)
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def _state_of_tree(self) -> TreeState:
        """Seen after CRIU reported a failure."""
        states = [read_status(pid, self._tools.proc) for pid in self._tree.pids]
        if not any(states):
            return TreeState.GONE
        for status in states:
            if status is None or status["State"][0] in "TtZX" or status["TracerPid"] != "0":
                return TreeState.BROKEN
        return TreeState.RUNNING

    async def _see_them_gone(self) -> None:
        """Every process dead and reaped: a zombie would hold its pid against the restore."""
        until = max(self._end, time.monotonic() + _GONE_TIMEOUT)
        for pid in self._tree.pids:
            while (status := read_status(pid, self._tools.proc)) is not None:
                if time.monotonic() > until:
                    raise failed(
                        "checkpoint",
                        self._handle.model,
                        f"process {pid} ({status.get('Name')}) is still there after the dump:"
                        f" {status.get('State')}",
                        None,
                        tree=TreeState.BROKEN,
                    )
                await asyncio.sleep(
                    0.002
                )  # teardown of gigabytes takes 10 to 100 ms, without an event

    # ---- what CRIU leaves to us -----------------------------------------------------------------

    def _take_shm(self) -> None:
        """Kept files into the image, links under names that no other image has."""
        path = os.path.join(self._directory, image_format.FILES)
        token = os.path.basename(self._directory).rpartition("-")[2]
        with open(path, "rb") as file:
            data, renamed = image_format.rename_links(file.read(), token)
        with open(path, "wb") as file:
            file.write(data)
        groups = shm.find_names(self._tree.shm, self._tools.shm)
        outside = [old for old in renamed if os.path.dirname(old) != self._tools.shm]
        if outside:
            raise OSError(
                0, f"a deleted file that the engine has open has other names, beside {outside[0]};"
                " outside /dev/shm llmux cannot keep such links"
            )  # fmt: skip
        self._shm = shm.keep(groups, self._directory, renamed, self._tools.shm)
        self._processes = self._read_processes()

    def _complete_record(self, held: dict[str, KnownFile]) -> tuple[KnownFile, ...]:
        remapped = held_names.read_remapped(self._directory)
        files = self._read(image_format.FILES)
        names = image_format.file_names(files).values()
        # CRIU makes sockets again, too, in directories that the engine chose.
        return known_files.complete(
            held, names, [*remapped, *self._tree.unix_paths], self._tools.shm
        )

    def _read(self, name: str) -> bytes:
        with open(os.path.join(self._directory, name), "rb") as file:
            return file.read()

    def _remove_shm(self) -> None:
        """Remove the tree's files and CRIU's links to them; only the links while the tree lives."""
        groups = shm.find_names(self._tree.shm, self._tools.shm)
        alive = any(read_status(pid, self._tools.proc) for pid in self._tree.pids)
        names = [name for group in groups.values() for name in group]
        links = [name for name in names if name.startswith("link_remap.")]
        shm.remove(links, self._tools.shm)
        if not alive:
            needed = held_names.needed_names(self._shm, self._directory, self._tools.shm)
            left = [name for name in names if name not in links]
            self._tools.held.dumped(self._handle.model, needed, left)

    def _read_processes(self) -> tuple[TreeProcess, ...]:
        """Processes and threads as dumped, which may be more than were there when we looked."""

        read = self._read
        threads = image_format.dumped_processes(read("pstree.img"))
        for tids in threads.values():
            for tid in tids:
                if not os.path.isfile(os.path.join(self._directory, f"core-{tid}.img")):
                    raise image_format.BadImage(f"core-{tid}.img is missing")
        for name in os.listdir(self._directory):
            if name.startswith("pagemap-"):
                number, size = image_format.stored_pages(read(name))
                if os.path.getsize(os.path.join(self._directory, f"pages-{number}.img")) != size:
                    raise image_format.BadImage(f"pages-{number}.img does not have {size} bytes")
        return tuple(
            TreeProcess(pid, image_format.dumped_name(read(f"core-{pid}.img")), tids)
            for pid, tids in threads.items()
        )

    def _shrink_log(self) -> None:
        """Every step of CRIU is in it: 4 MB of a vLLM's image, 0.3 packed (measured)."""
        path = os.path.join(self._directory, command.DUMP_LOG)
        with open(path, "rb") as log, gzip.open(f"{path}.gz", "wb", compresslevel=1) as packed:
            shutil.copyfileobj(log, packed)
        os.unlink(path)

    async def _pack_in_time(self, seconds: float) -> Image:
        """Threads cannot be cancelled, so the deadline is an event that they look at."""
        stop = Event()
        left = max(self._end - time.monotonic(), _PACK_LEAST)
        timer = asyncio.get_running_loop().call_later(left, stop.set)
        try:
            return await self._pack(seconds, stop)
        except Stopped:
            text = f"its image was not packed and checksummed within {left:.0f}s"
            hint = "is the disk of checkpoint.images_dir slow?"
            raise failed("checkpoint", self._handle.model, text, hint) from None
        finally:
            timer.cancel()

    async def _pack(self, seconds: float, stop: Event) -> Image:
        await asyncio.to_thread(zero_pages.drop_zero_pages, self._directory, stop)
        await asyncio.to_thread(self._shrink_log)
        names = await asyncio.to_thread(self._list_files)
        total, _ = await asyncio.to_thread(sizes_on_disk, self._directory)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            loop.call_soon_threadsafe(self._progress, DumpPhase.PACK, done, total)

        loop = asyncio.get_running_loop()
        files = await asyncio.to_thread(
            digest_files, self._directory, names, punch=True, stop=stop, count=count
        )
        self._progress(DumpPhase.SYNC, 0, total)
        apparent, on_disk = await asyncio.to_thread(sizes_on_disk, self._directory)
        launch = self._spec.launch
        outputs = (KeptPath.look(path) for path in dict.fromkeys((launch.stdout, launch.stderr)))
        manifest = Manifest(
            model=self._handle.model,
            created=time.time(),
            dump_seconds=round(seconds, 3),
            cold_seconds=self._spec.cold_seconds,
            criu=self._tools.version,
            identity=dict(self._spec.identity),
            recipe=dict(self._spec.recipe),
            root_pid=self._tree.root,
            processes=self._processes,
            runtime_dir=KeptPath.look(launch.runtime_dir),
            append_files=tuple(kept for kept in outputs if kept is not None),
            unix_paths=self._tree.unix_paths,
            tcp_ports=self._tree.tcp_ports,
            shm=self._shm,
            known=self._known,
            files=files,
            apparent_bytes=apparent,
            disk_bytes=on_disk,
            small=self._small,
        )
        os.unlink(os.path.join(self._directory, DUMPING))
        image = await asyncio.to_thread(self._store.publish, self._directory, manifest)
        self._progress(DumpPhase.DONE, total, total)
        return image

    def _list_files(self) -> Sequence[str]:
        """All files of the image, closed to others: CRIU makes them 0644 whatever they hold."""
        names = []
        for root, _, files in os.walk(self._directory):
            for name in files:
                path = os.path.join(root, name)
                os.chmod(path, 0o600)
                relative = os.path.relpath(path, self._directory)
                if relative not in _NOT_PART_OF_IT:
                    names.append(relative)
        return sorted(names)
