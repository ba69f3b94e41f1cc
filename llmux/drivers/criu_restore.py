"""One restore: from an image to a living tree in a new unit, or to nothing at all.

CRIU is the payload of the unit: the launcher execs it, so everything that it forks is born
there. It exits when the tree runs (``--restore-detached``); then the root of the tree is the
unit's root.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import replace

from llmux.drivers import criu_amx, criu_cli, criu_host, criu_img, criu_shm
from llmux.drivers.criu_dump import Tools, failed, to_its_end
from llmux.drivers.images import ImageStore
from llmux.drivers.images_manifest import Manifest, ManifestError
from llmux.drivers.images_notes import RESTORING, write_note
from llmux.drivers.process import start_ticks
from llmux.drivers.spawn import unit_name
from llmux.errors import CheckpointFailed, DriverError, DriverTimeout
from llmux.ports import Image, LaunchSpec, UnitHandle, UnitManager

_KILL_TIMEOUT = 10.0


class Restore:
    """State of one restore; used once. Its note outlives it when it succeeds: see Dumper.settle."""

    def __init__(
        self,
        tools: Tools,
        store: ImageStore,
        units: UnitManager,
        image: Image,
        launch: LaunchSpec,
        deadline: float,
        spare: int = 0,
    ) -> None:
        self._tools = tools
        self._store = store
        self._units = units
        self._image = image
        self._launch = launch
        self._end = time.monotonic() + deadline
        self._spare = spare
        self._work = ""
        self._note = ""
        self._made: tuple[str, ...] = ()
        self._litter: list[str] = []
        self._started: UnitHandle | None = None

    async def run(self, verified: Awaitable[str | None]) -> UnitHandle:
        """``verified`` gives what is wrong with the image's bytes, None when nothing is; awaited
        last, so that it runs beside CRIU."""
        try:
            # A thread cannot be cancelled: what it makes must be known before it is undone.
            manifest = await to_its_end(asyncio.to_thread(self._prepare))
            criu = await self._start()
            await self._see_it_end(criu)
            handle = await self._see_the_tree(manifest, criu)
            async with asyncio.timeout_at(self._loop_end()):
                damage = await verified
            if damage is not None:
                raise self._failed(damage, "image")
            await asyncio.to_thread(self._store.used, self._image.model)
            # CRIU removes its links itself; should one be left, it is ours.
            links = [name for name in self._made if name.startswith("link_remap.")]
            await asyncio.to_thread(criu_shm.remove, links, self._tools.shm)
            return handle
        except BaseException as error:
            await asyncio.shield(self._undo())
            if isinstance(error, TimeoutError):
                raise self._failed("its checksums were not done in time", "host") from error
            raise

    def _failed(self, message: str, blame: str, hint: str | None = None) -> CheckpointFailed:
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
            raise self._failed(f"the image cannot be used: {error}", "image") from error
        self._work = self._store.restore_directory(self._image.model)
        self._note = os.path.join(os.path.dirname(self._work), RESTORING)
        try:
            criu_host.check_pids(manifest, self._tools.proc)
            criu_host.check_ports(manifest, self._tools.proc)
            criu_host.check_memory(manifest.apparent_bytes, self._spare)
            criu_host.put_right(manifest)
            criu_host.clear_sockets(manifest, self._tools.proc)
            self._litter = self._read_litter()
            criu_shm.remove_litter(self._litter, self._tools.shm, self._tools.proc)
            write_note(
                self._note,
                {
                    "unit": unit_name(self._image.model),
                    "operation": "restore",
                    "names": [name for group in manifest.shm for name in group.names],
                    "litter": self._litter,
                },
            )
            self._made = criu_shm.put_back(
                manifest.shm, self._image.path, self._tools.shm, self._tools.proc
            )
        except (criu_host.HostNotReady, criu_shm.ShmTaken) as error:
            raise self._failed(
                str(error), "host", "end what is in the way, or start the model without its image"
            ) from error
        except criu_img.BadImage as error:
            raise self._failed(f"the image cannot be used: {error}", "image") from error
        except OSError as error:
            raise self._failed(str(error), "host") from error
        return manifest

    def _read_litter(self) -> list[str]:
        def read(name: str) -> bytes:
            with open(os.path.join(self._image.path, name), "rb") as file:
                return file.read()

        try:
            remaps = read(criu_img.REMAPS)
        except FileNotFoundError:
            return []  # no deleted files
        return criu_img.litter(read(criu_img.FILES), remaps)

    # ---- CRIU -----------------------------------------------------------------------------------

    async def _start(self) -> UnitHandle:
        argv = criu_cli.restore_arguments(
            self._tools.criu, self._image.path, self._work, self._tools.libdir
        )
        if criu_amx.is_needed():
            argv = criu_amx.wrapped(argv)
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
                "CRIU was not done in time", "host", "is the disk slow? read-ahead helps"
            ) from None
        finally:
            self._units.unwatch(criu)
        log = await asyncio.to_thread(self._read, criu_cli.RESTORE_LOG)
        if description != "exit status 0" or not criu_cli.succeeded(log, "restore"):
            text = criu_cli.excerpt(log) or await asyncio.to_thread(self._read, "criu.out")
            message = f"CRIU: {text.strip() or 'no error in its log'} ({description})"
            host = description.startswith("killed") or criu_cli.blames_host(text)
            raise self._failed(message, "host" if host else "image", criu_cli.hint_for(text))

    def _read(self, name: str) -> str:
        try:
            path = os.path.join(self._work, name)
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    # ---- after ----------------------------------------------------------------------------------

    async def _see_the_tree(self, manifest: Manifest, criu: UnitHandle) -> UnitHandle:
        written = (await asyncio.to_thread(self._read, criu_cli.PID_FILE)).strip()
        if written != str(manifest.root_pid):
            raise self._failed(
                f"CRIU says that the root process is {written or 'nothing'},"
                f" the image has {manifest.root_pid}",
                "image",
            )
        ticks = start_ticks(manifest.root_pid)
        handle = replace(criu, pid=manifest.root_pid, start_ticks=ticks or 0)
        members = list(await self._units.pids(handle))
        wrong = await asyncio.to_thread(
            criu_host.missing_processes, manifest, members, self._tools.proc
        )
        if ticks is None or wrong:
            raise self._failed("; ".join(wrong) or "the root process has ended at once", "image")
        return handle

    async def _undo(self) -> None:
        """Nothing of it stays: no process, no file in /dev/shm, no note."""
        if self._started is not None:
            with suppress(DriverTimeout, DriverError):
                await self._units.kill(self._started, _KILL_TIMEOUT)
        await asyncio.to_thread(criu_shm.remove, self._made, self._tools.shm)
        await asyncio.to_thread(
            criu_shm.remove_litter, self._litter, self._tools.shm, self._tools.proc
        )
        if self._note:
            await asyncio.to_thread(self._store.forget, self._note)
