"""Start the NVIDIA driver before the first engine does, and notice one that is loaded later.

Only root can load nvidia-uvm and make its device node: an engine, without privileges, fails in its
first CUDA call where nobody used CUDA since the boot.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from llmux.drivers.cuda.driver import CudaDriver
from llmux.drivers.gpu import nvml_is_here
from llmux.errors import DriverError

log = logging.getLogger("llmux")

VERSION: Final = "/proc/driver/nvidia/version"
# cuInit takes 2.7 s on 8 x H100, more without persistence mode. An engine that starts meanwhile
# waits for so long at most: well within the deadline of its spawn (``SPAWN_SECS``).
INITIALISE_SECS: Final = 15.0
LOOK_EVERY: Final = 10.0  # for a driver that is not there; /proc gives no event
# A driver that comes and goes must not restart llmux all the time.
RESTART_EVERY: Final = 600.0


class CudaStart:
    """CUDA's initialisation as root; engines wait for its end.

    ``driver``'s helper process does it and stays: without persistence mode it also keeps the
    driver's state alive.
    """

    def __init__(self, driver: CudaDriver, seconds: float = INITIALISE_SECS) -> None:
        self._driver = driver
        self._seconds = seconds
        self._work: asyncio.Task[bool] | None = None

    async def _initialise(self) -> bool:
        try:
            await self._driver.initialise()
        except DriverError as error:
            log.warning("CUDA cannot be initialised, engines may fail: %s", error)
            return False
        return True

    async def wait(self) -> None:
        """Returns when CUDA was initialised, or failed to be, or takes too long. Never raises. What
        failed is tried again by the next who waits: a fabric manager may have come since."""
        if self._work is None or (self._work.done() and not self._work.result()):
            self._work = asyncio.create_task(self._initialise())
        await asyncio.wait({self._work}, timeout=self._seconds)


async def restart_for_driver(
    restart: Callable[[], bool],
    mark: str,
    *,
    loaded: bool,
    version: str = VERSION,
    has_nvml: Callable[[], bool] = nvml_is_here,
    every: float = LOOK_EVERY,
) -> None:
    """For a supervisor that found no GPU: restart it when a driver is there. It then counts GPUs,
    finds CUDA and looks at memory as from the beginning, and engines go on. Never returns.

    ``loaded``: the driver was there when it began, so that only its NVML is missed. ``mark``: a
    file that is as old as the last such restart.
    """
    while True:
        await asyncio.sleep(every)
        if not os.path.exists(version):  # noqa: ASYNC240  # /proc does not block
            continue
        if loaded and not await asyncio.to_thread(has_nvml):
            continue
        if not _may_restart(mark):
            continue
        log.warning("the NVIDIA driver is there now: llmux restarts to use it, engines go on")
        if not await asyncio.to_thread(restart):
            log.warning(
                "llmux cannot restart itself: `systemctl restart llmux` makes it use GPUs"
                " (it tries again in %d minutes)",
                RESTART_EVERY / 60,
            )


def _may_restart(mark: str) -> bool:
    """Whether the last one is long ago; this one is marked. Without a mark there is none."""
    with suppress(FileNotFoundError):
        if 0 <= time.time() - os.stat(mark).st_mtime < RESTART_EVERY:
            return False
    try:
        Path(mark).touch(mode=0o600)
    except OSError as error:
        log.warning("the NVIDIA driver is there now, `systemctl restart llmux` uses it: %s", error)
        return False
    return True
