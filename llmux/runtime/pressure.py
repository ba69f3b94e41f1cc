"""Tell the core when the host runs short of memory."""

from __future__ import annotations

import asyncio
import logging

from llmux.core.events import MemoryPressure
from llmux.ports import MemoryObserver
from llmux.runtime.loop import Loop

log = logging.getLogger("llmux")

INTERVAL_SECS = 2.0  # the kernel's average is over 10 s
SHORT = 5.0  # percent of the time in which every task waits for memory
ENOUGH = 1.0


async def watch_pressure(
    loop: Loop, observer: MemoryObserver, interval: float = INTERVAL_SECS
) -> None:
    """Report when host memory becomes short, and when there is enough again. Runs until cancelled;
    a kernel without pressure stall information says nothing."""
    while True:
        stalled = observer.stalled_percent()
        short = loop.state.memory_short
        if stalled is not None and stalled >= SHORT and not short:
            log.warning(
                "host memory is short: all tasks waited for it in %g %% of the last 10 s; parked"
                " models go down their ladders",
                stalled,
            )
            loop.post(MemoryPressure(True))
        elif short and (stalled is None or stalled < ENOUGH):
            log.info("host memory is no longer short")
            loop.post(MemoryPressure(False))
        await asyncio.sleep(interval)
