"""The whole of llmux where systemd is not: ``llmux serve`` with the service's drivers for CUDA and
CRIU, and engines in bare units. A program for ``gpu-proof --serve``: ``-m _gpu_proof.service CONFIG
SOCKET``.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from dataclasses import replace

from llmux.config.schema import Config
from llmux.daemon.serve import embedded_drivers, serve
from llmux.daemon.supervise import cuda_driver, cuda_start
from llmux.drivers.criu.driver import Criu
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.bare import BareUnits, find_cgroup
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.errors import DriverError
from llmux.image_ports import DumpSpec, Image, Progress
from llmux.ports import UnitHandle
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

END_SECS = 10.0


class Units(BareUnits):
    """What runs ends with llmux, as children do."""

    def __init__(self, place: tuple[str, str] | None) -> None:
        super().__init__(place)
        self._followed: dict[str, UnitHandle] = {}

    def watch(self, handle: UnitHandle, on_exit: Callable[[UnitHandle, str], None]) -> None:
        self._followed[handle.model] = handle
        super().watch(handle, on_exit)

    async def close(self) -> None:
        for handle in self._followed.values():
            try:
                await self.kill(handle, END_SECS)
            except DriverError as error:  # the others end all the same
                log.error("%s", error)


class ReapingCriu(Criu):
    """systemd reaps the orphans of a dumped engine; here nobody else does."""

    def __init__(self, units: Units, config: Config, cgroup_root: str) -> None:
        directory = config.checkpoint.images_dir
        path = config.checkpoint.criu_path
        store = ImageStore(directory)
        super().__init__(units, store, directory, criu_path=path, cgroup_root=cgroup_root)
        self._bare = units

    async def dump(
        self,
        handle: UnitHandle,
        spec: DumpSpec,
        deadline: float,
        progress: Progress | None = None,
    ) -> Image:
        async with self._bare.reaping(await self._bare.pids(handle)):
            return await super().dump(handle, spec, deadline, progress)


def drivers(config: Config, runtime: str) -> Drivers:
    place = find_cgroup()
    units, root = Units(place), place[0] if place else "/sys/fs/cgroup"
    cuda = cuda_driver(config)
    start = cuda_start(cuda)
    return replace(
        embedded_drivers(config, runtime),
        units=units,
        freezer=CgroupFreezer(root),
        checkpointer=ReapingCriu(units, config, root),
        cuda=cuda,
        cuda_started=start.wait if start is not None else None,
        keep_images=config.checkpoint.keep_images,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(sys.argv[1], control=sys.argv[2], drivers=drivers))
