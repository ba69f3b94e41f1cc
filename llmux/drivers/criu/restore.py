"""One restore: from an image to a living tree in a new unit, or to nothing at all.

CRIU is the payload of the unit: the launcher execs it, so everything that it forks is born
there. It exits when the tree runs (``--restore-detached``); then the root of the tree is the
unit's root.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import replace

from llmux.drivers.criu import (
    amx,
    command,
    held_names,
    host,
    image_format,
    known_files,
    shm,
    small_files,
)
from llmux.drivers.criu.tools import Tools, failed, finish_despite_cancellation
from llmux.drivers.images.manifest import Manifest, ManifestError
from llmux.drivers.images.notes import RESTORING, write_note
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.process import start_ticks
from llmux.drivers.processes.spawn import unit_name
from llmux.errors import Blame, CheckpointFailed, DriverError, DriverTimeout
from llmux.image_ports import Image
from llmux.ports import LaunchSpec, UnitHandle, UnitManager

_KILL_TIMEOUT = 10.0


class Restore:
    """State of one restore; used once. After a success its note stays until it is confirmed."""

    def __init__(
        self,
        tools: Tools,
        store: ImageStore,
        units: UnitManager,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        reserve_bytes: int = 0,
    ) -> None:
        self._tools = tools
        self._store = store
        self._units = units
        self._image = image
        self._launch = launch
        self._end = time.monotonic() + deadline
        self._reserve_bytes = reserve_bytes
        self._work = ""
        self._note = ""
        self._made: tuple[str, ...] = ()
        self._small: tuple[str, ...] = ()
        self._remapped: dict[str, str] = {}
        self._leftovers: list[str] = []
        self._uid = os.geteuid()
        self._started: UnitHandle | None = None

    async def run(self, verified: Awaitable[str | None]) -> UnitHandle:
        """``verified`` gives what is wrong with the image's bytes, None when nothing is; awaited
        last, so that it runs beside CRIU."""
        try:
            # A thread cannot be cancelled: what it makes must be known before it is undone.
            manifest = await finish_despite_cancellation(asyncio.to_thread(self._prepare))
            criu = await self._start()
            await self._see_it_end(criu)
            handle = await self._see_the_tree(manifest, criu)
            async with asyncio.timeout_at(self._loop_end()):
                damage = await verified
            if damage is not None:
                raise self._failed(damage, Blame.IMAGE)
            await asyncio.to_thread(self._release, manifest)
            await asyncio.to_thread(self._store.used, self._image.model)
            # CRIU removes its links itself; should one be left, it is ours.
            links = [name for name in self._made if name.startswith("link_remap.")]
            await asyncio.to_thread(self._tools.held.give_up, links)
            return handle
        except BaseException as error:
            await asyncio.shield(self._undo())
            if isinstance(error, TimeoutError):
                raise self._failed("its checksums were not done in time", Blame.HOST) from error
            raise

    def _failed(self, message: str, blame: Blame, hint: str | None = None) -> CheckpointFailed:
        return failed("restore", self._image.model, message, hint, blame=blame)

    def _left(self) -> float:
        return max(self._end - time.monotonic(), 0.001)

    def _loop_end(self) -> float:
        return asyncio.get_running_loop().time() + self._left()

    # ---- before ---------------------------------------------------------------------------------

    def _prepare(self) -> Manifest:
        try:
            manifest = self._store.load(self._image.path)
        except ManifestError as error:
            raise self._failed(f"the image cannot be used: {error}", Blame.IMAGE) from error
        self._work = self._store.restore_directory(self._image.model)
        self._note = os.path.join(os.path.dirname(self._work), RESTORING)
        try:
            host.check_pids(manifest, self._tools.proc)
            host.check_ports(manifest, self._tools.proc)
            host.check_memory(manifest.apparent_bytes, self._reserve_bytes)
            host.put_right(manifest)
            self._small = small_files.put_back(
                manifest.small,
                self._image.path,
                small_files.own_directories(self._launch.env),
            )
            known_files.check(manifest.known, self._own_paths(manifest))
            host.clear_sockets(manifest, self._tools.proc)
            self._uid = manifest.runtime_dir.uid if manifest.runtime_dir else os.geteuid()
            self._remapped = held_names.read_remapped(self._image.path)
            self._leftovers = list(self._remapped.values())
            self._remove_leftovers()
            write_note(
                self._note,
                {
                    "unit": unit_name(self._image.model),
                    "operation": "restore",
                    "names": [name for group in manifest.shm for name in group.names],
                    "leftovers": self._leftovers,
                    "uid": self._uid,
                },
            )
            self._made = shm.put_back(
                manifest.shm,
                self._image.path,
                self._tools.held,
                self._tools.shm,
                self._tools.proc,
            )
            # what CRIU makes for a moment must be free for it
            self._tools.held.begin(self._image.model)
        except (host.HostNotReady, shm.ShmTaken) as error:
            raise self._failed(
                str(error),
                Blame.HOST,
                "end what is in the way, or start the model without its image",
            ) from error
        except (image_format.BadImage, known_files.FileChanged) as error:
            raise self._failed(f"the image cannot be used: {error}", Blame.IMAGE) from error
        except OSError as error:
            raise self._failed(str(error), Blame.HOST) from error
        return manifest

    def _own_paths(self, manifest: Manifest) -> list[str]:
        """Files that llmux makes, and makes again, itself: see ``host.put_right``."""
        paths = [*(kept.path for kept in manifest.append_files), *self._small]
        return [*paths, manifest.runtime_dir.path] if manifest.runtime_dir else paths

    def _remove_leftovers(self) -> None:
        shm.remove_leftovers(self._leftovers, self._uid, self._tools.shm, self._tools.proc)

    # ---- CRIU -----------------------------------------------------------------------------------

    async def _start(self) -> UnitHandle:
        argv = command.restore_arguments(
            self._tools.criu, self._image.path, self._work, self._tools.libdir
        )
        if amx.is_needed():
            argv = amx.wrapped(argv)
        spec = replace(
            self._launch,
            argv=tuple(argv),
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            user=None,
            stdout=os.path.join(self._work, "criu.out"),
            stderr=os.path.join(self._work, "criu.out"),
            # Not the engine's, which would be given to root: that one was put right from the
            # manifest.
            runtime_dir=os.path.join(self._work, "run"),
            cwd="/",
            deny_io_uring=False,
        )
        handle = self._started = await self._units.start(spec, self._left())
        return handle

    async def _see_it_end(self, criu: UnitHandle) -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_exit(_: UnitHandle, description: str) -> None:
            if not ended.done():
                ended.set_result(description)

        self._units.watch(criu, on_exit)
        try:
            async with asyncio.timeout_at(self._loop_end()):
                description = await ended
        except TimeoutError:
            raise self._failed(
                "CRIU was not done in time", Blame.HOST, "is the disk slow? read-ahead helps"
            ) from None
        finally:
            self._units.unwatch(criu)
        log = await asyncio.to_thread(self._read, command.RESTORE_LOG)
        if description != "exit status 0" or not command.succeeded(log, "restore"):
            text = command.excerpt(log) or await asyncio.to_thread(self._read, "criu.out")
            message = f"CRIU: {text.strip() or 'no error in its log'} ({description})"
            blame = Blame.IMAGE
            if description.startswith("killed") or command.blames_host(text):
                blame = Blame.HOST
            raise self._failed(message, blame, command.hint_for(text))

    def _read(self, name: str) -> str:
        try:
            path = os.path.join(self._work, name)
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    # ---- after ----------------------------------------------------------------------------------

    async def _see_the_tree(self, manifest: Manifest, criu: UnitHandle) -> UnitHandle:
        written = (await asyncio.to_thread(self._read, command.PID_FILE)).strip()
        if written != str(manifest.root_pid):
            raise self._failed(
                f"CRIU says that the root process is {written or 'nothing'},"
                f" the image has {manifest.root_pid}",
                Blame.IMAGE,
            )
        ticks = start_ticks(manifest.root_pid)
        handle = replace(criu, pid=manifest.root_pid, start_ticks=ticks or 0)
        members = list(await self._units.pids(handle))
        wrong = await asyncio.to_thread(host.missing_processes, manifest, members, self._tools.proc)
        if ticks is None or wrong:
            raise self._failed(
                "; ".join(wrong) or "the root process has ended at once", Blame.IMAGE
            )
        return handle

    def _release(self, manifest: Manifest) -> None:
        """Let the stopped tree run once it is known to hold what it held."""
        pids = [process.pid for process in manifest.processes]
        try:
            known_files.check_restored(
                pids,
                manifest.known,
                self._own_paths(manifest),
                [*self._remapped, *self._leftovers],
                self._tools.proc,
                self._tools.shm,
            )
        except known_files.FileChanged as error:
            raise self._failed(f"it was ended at once: {error}", Blame.IMAGE) from error
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    async def _undo(self) -> None:
        """Remove everything: processes, files in /dev/shm, the note."""
        if self._started is not None:
            with suppress(DriverTimeout, DriverError):
                await self._units.kill(self._started, _KILL_TIMEOUT)
        await asyncio.to_thread(self._remove_leftovers)
        await asyncio.to_thread(self._tools.held.end, self._image.model, self._made)
        if self._note:
            await asyncio.to_thread(self._store.forget, self._note)
