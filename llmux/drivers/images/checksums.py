"""The checksums of an image compared in a thread, while its restore begins."""

from __future__ import annotations

import asyncio
from threading import Event

from llmux.drivers.images.files import digest_files, first_difference
from llmux.drivers.images.manifest import Manifest
from llmux.image_ports import DumpPhase, Progress


class ImageCheck:
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
        self._loop.call_soon_threadsafe(self._report, self._done)

    def _report(self, done: int) -> None:
        self.progress(DumpPhase.PACK, done, self._total)
