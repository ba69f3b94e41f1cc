"""Host memory that a parked engine takes."""

from __future__ import annotations

import asyncio
import logging

from llmux.errors import LlmuxError
from llmux.runtime.engines.instance import Instance
from llmux.runtime.host import Drivers

log = logging.getLogger("llmux")

LOOK_SECS = 10.0


async def host_bytes(drivers: Drivers, instance: Instance) -> int | None:
    """What the parked engine takes; None when that cannot be seen, or it has no processes."""
    try:
        async with asyncio.timeout(LOOK_SECS):
            handle = instance.handle
            return None if handle is None else await drivers.units.memory_bytes(handle)
    except (LlmuxError, TimeoutError) as error:
        log.debug("cannot see the memory of %s: %s", instance.config.name, error)
        return None
