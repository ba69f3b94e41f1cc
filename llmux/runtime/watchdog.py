"""READY, STATUS and WATCHDOG, tied to the loop having turned."""

from __future__ import annotations

import asyncio
import logging

from llmux.core.effects import SwitchFinished
from llmux.core.events import Tick
from llmux.core.records import State
from llmux.ports import Notifier
from llmux.runtime.control.status import one_line
from llmux.runtime.loop import Loop

log = logging.getLogger("llmux")

GATEWAY_SECS = 5.0  # a gateway starts in 0.3 s, on a busy machine in 2; its longest retry is 1 s


class StatusLine:
    """Sends systemd the active models whenever they change."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._last = ""

    def published(self, old: State, new: State) -> None:
        line = one_line(new)
        if line != self._last:
            self._last = line
            self._notifier.status(line)

    def switched(self, switch: SwitchFinished) -> None:
        pass


async def announce_ready(loop: Loop, notifier: Notifier) -> None:
    """READY once a request can be served, which takes a gateway. One that cannot start does not
    keep operators from the supervisor, so the wait for it is short."""
    try:
        await loop.wait_for(lambda state: bool(state.workers), GATEWAY_SECS)
    except TimeoutError:
        log.warning(
            "no gateway has connected within %g s; next step: systemctl status llmux-gateway",
            GATEWAY_SECS,
        )
    notifier.ready()


async def feed_watchdog(loop: Loop, notifier: Notifier, interval: float) -> None:
    """Every third of the watchdog's ``interval`` (seconds), but only if the loop still turns: a
    Tick is posted, and the datagram is sent once it has been handled."""
    while True:
        turned = loop.turned
        loop.post(Tick())
        await asyncio.sleep(interval / 3)
        if loop.turned != turned:
            notifier.watchdog()
