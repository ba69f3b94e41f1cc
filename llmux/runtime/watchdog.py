"""READY, STATUS and WATCHDOG, tied to the loop having turned."""

from __future__ import annotations

import asyncio

from llmux.core.effects import SwitchFinished
from llmux.core.events import Tick
from llmux.core.records import State
from llmux.ports import Notifier
from llmux.runtime.loop import Loop
from llmux.runtime.status import one_line


class StatusLine:
    """Tells systemd the active models whenever they change."""

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


async def feed_watchdog(loop: Loop, notifier: Notifier, interval: float) -> None:
    """Every third of the watchdog's ``interval`` (seconds), but only if the loop still turns: a
    Tick is posted, and the datagram is sent once it has been handled."""
    while True:
        turned = loop.turned
        loop.post(Tick())
        await asyncio.sleep(interval / 3)
        if loop.turned != turned:
            notifier.watchdog()
