"""``warmup: true``: at start every model is brought up, checked and parked, one after the other.

So the first request finds a parked model instead of a cold start. Clients may come meanwhile: they
go first, since a model with waiting requests is not parked before it has served. A model that
cannot be started is left to its back-off; the others go on.
"""

from __future__ import annotations

import logging

from llmux.config.schema import Process
from llmux.core.records import State, Stopped
from llmux.errors import Refused
from llmux.runtime.control.orders import bring_down, bring_up
from llmux.runtime.loop import Loop

log = logging.getLogger("llmux")


def to_warm(state: State) -> list[str]:
    """Models that are not up, parked or on disk already, and that parking keeps something of."""
    return [
        name
        for name, record in state.models.items()
        if isinstance(record.phase, Stopped)
        and record.image is None
        and record.eviction.process is not Process.STOP
    ]


async def warm_up(loop: Loop) -> None:
    for name in to_warm(loop.state):
        try:
            await bring_up(loop, name)
            await bring_down(loop, name, None)
        except Refused as refusal:
            log.warning("cannot warm %s up: %s", name, refusal, extra={"model": name})
        else:
            log.info("%s is warm", name, extra={"model": name})
