"""One dump: from a living tree to a complete image, or back to where it was.

What a failure leaves, found by killing CRIU at many moments (4.2.1, 2026-11): when CRIU itself
fails (disk full, something it cannot dump) it lets the tree go on unharmed; when CRIU is
*killed*, threads may die in its injected code and TCP sockets stay in repair mode, so the tree
must be killed.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import logging
import os
import shutil
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, Final, TypeVar

from llmux.drivers import criu_cli, criu_img, criu_pages, criu_shm
from llmux.drivers.criu_tree import TreeFacts, TreeProcess, read_status
from llmux.drivers.images import ImageStore
from llmux.drivers.images_files import digest_files, sizes_on_disk
from llmux.drivers.images_manifest import KeptPath, Manifest
from llmux.drivers.images_notes import DUMPING, write_note
from llmux.drivers.run import run
from llmux.errors import CheckpointFailed, DriverTimeout, LlmuxError
from llmux.ports import DumpPhase, DumpSpec, Image, Progress, UnitHandle

log = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_PART_OF_IT: Final = frozenset({f"{criu_cli.DUMP_LOG}.gz", DUMPING, "stats-dump"})
_LOOK_EVERY: Final = 0.25  # seconds between two progress reports
_GONE_TIMEOUT: Final = 10.0  # from CRIU's SIGKILL to the last process reaped by its parent


@dataclass(frozen=True, slots=True)
class Tools:
    """What dump and restore share: where things are on this host."""

    criu: str
    version: str
    libdir: str
    proc: str
    shm: str
    cgroup_root: str


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end even when we are cancelled; the cancellation comes after."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)
        raise


def failed(
    operation: str, model: str, message: str, hint: str | None, **fields: Any
) -> CheckpointFailed:
    return CheckpointFailed(operation, f'model "{model}"', message, hint=hint, **fields)


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
        self._shm: tuple[criu_shm.ShmGroup, ...] = ()

    async def run(self, lock: asyncio.Lock) -> Image:
        """``lock``: CRIU's ``link_remap.N`` in /dev/shm have the same names in every dump, so
        dumps go one at a time until those are renamed."""
        model = self._handle.model
        self._directory = await asyncio.to_thread(self._store.begin, model)
        started = time.monotonic()
        try:
            async with lock:
                try:
                    await self._dump()
                    await self._see_them_gone()
                    self._progress(DumpPhase.RELEASED, 0, 0)
                    await asyncio.to_thread(self._take_shm)
                finally:
                    # Also after a failure: links that a killed CRIU left are ours to remove.
                    await asyncio.to_thread(self._remove_shm)
            seconds = time.monotonic() - started
            return await self._pack(seconds)
        except (OSError, criu_img.BadImage, LlmuxError) as error:
            await asyncio.to_thread(self._store.abandon, self._directory, criu_cli.DUMP_LOG)
            if isinstance(error, LlmuxError):
                raise
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space in checkpoint.images_dir" if full else None
            # Only what follows the end of the processes raises these.
            raise failed("checkpoint", model, str(error), hint, tree="gone") from error

    # ---- CRIU -----------------------------------------------------------------------------------

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
        argv = criu_cli.dump_arguments(
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
                "the engine cannot go on after that and must be killed; is the disk slow?",
                tree="broken",
            ) from error
        log = await asyncio.to_thread(self._read_log)
        if result.code == 0 and criu_cli.succeeded(log, "dump"):
            return
        text = criu_cli.excerpt(log) or result.excerpt or f"CRIU ended with status {result.code}"
        if result.code < 0:
            text = f"CRIU was killed by signal {-result.code}"
        tree = "broken" if result.code < 0 else await asyncio.to_thread(self._state_of_tree)
        raise failed("checkpoint", model, text, criu_cli.hint_for(text), tree=tree)

    def _read_log(self) -> str:
        try:
            path = os.path.join(self._directory, criu_cli.DUMP_LOG)
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def _state_of_tree(self) -> str:
        """After CRIU said that it failed: "running", "gone" or "broken"."""
        states = [read_status(pid, self._tools.proc) for pid in self._tree.pids]
        if not any(states):
            return "gone"
        for status in states:
            if status is None or status["State"][0] in "TtZX" or status["TracerPid"] != "0":
                return "broken"
        return "running"

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
                        tree="broken",
                    )
                await asyncio.sleep(
                    0.002
                )  # teardown of gigabytes takes 10 to 100 ms, without an event

    # ---- what CRIU leaves to us -----------------------------------------------------------------

    def _take_shm(self) -> None:
        """Kept files into the image, links under names that no other image has."""
        path = os.path.join(self._directory, criu_img.FILES)
        token = os.path.basename(self._directory).rpartition("-")[2]
        with open(path, "rb") as file:
            data, renamed = criu_img.rename_links(file.read(), token)
        with open(path, "wb") as file:
            file.write(data)
        groups = criu_shm.find_names(self._tree.shm, self._tools.shm)
        outside = [old for old in renamed if os.path.dirname(old) != self._tools.shm]
        if outside:
            raise OSError(
                0, f"a deleted file that the engine has open has other names, beside {outside[0]};"
                " outside /dev/shm llmux cannot keep such links"
            )  # fmt: skip
        self._shm = criu_shm.keep(groups, self._directory, renamed, self._tools.shm)
        self._processes = self._read_processes()

    def _remove_shm(self) -> None:
        """The tree's own files, and CRIU's links to them, unless the tree lives on and needs its
        own."""
        groups = criu_shm.find_names(self._tree.shm, self._tools.shm)
        alive = any(read_status(pid, self._tools.proc) for pid in self._tree.pids)
        names = [name for group in groups.values() for name in group]
        criu_shm.remove(
            [name for name in names if not alive or name.startswith("link_remap.")], self._tools.shm
        )

    def _read_processes(self) -> tuple[TreeProcess, ...]:
        """Processes and threads as dumped, which may be more than were there when we looked."""

        def read(name: str) -> bytes:
            with open(os.path.join(self._directory, name), "rb") as file:
                return file.read()

        threads = criu_img.dumped_processes(read("pstree.img"))
        for tids in threads.values():
            for tid in tids:
                if not os.path.isfile(os.path.join(self._directory, f"core-{tid}.img")):
                    raise criu_img.BadImage(f"core-{tid}.img is missing")
        for name in os.listdir(self._directory):
            if name.startswith("pagemap-"):
                number, size = criu_img.stored_pages(read(name))
                if os.path.getsize(os.path.join(self._directory, f"pages-{number}.img")) != size:
                    raise criu_img.BadImage(f"pages-{number}.img does not have {size} bytes")
        return tuple(
            TreeProcess(pid, criu_img.dumped_name(read(f"core-{pid}.img")), tids)
            for pid, tids in threads.items()
        )

    def _shrink_log(self) -> None:
        """Every step of CRIU is in it: 4 MB of a vLLM's image, 0.3 packed (measured)."""
        path = os.path.join(self._directory, criu_cli.DUMP_LOG)
        with open(path, "rb") as log, gzip.open(f"{path}.gz", "wb", compresslevel=1) as packed:
            shutil.copyfileobj(log, packed)
        os.unlink(path)

    async def _pack(self, seconds: float) -> Image:
        await asyncio.to_thread(criu_pages.drop_zero_pages, self._directory)
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
            digest_files, self._directory, names, punch=True, stop=Event(), count=count
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
            files=files,
            apparent_bytes=apparent,
            disk_bytes=on_disk,
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
