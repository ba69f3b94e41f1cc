"""What operators' orders have in common: ask the core for it, wait until it is seen done.

Every order goes through the core as an event; nothing here decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic

from llmux.config.schema import Eviction
from llmux.core.events import LoadAsked, ParkAsked
from llmux.core.records import Failed, ModelRecord, Parked, Serving, State, Stopped
from llmux.errors import Reason, Refused
from llmux.protocol import Tell
from llmux.runtime.loop import Loop

HEARTBEAT_SECS = 1.0  # a terminal shows the seconds go by


def nobody(_phase: str, _seconds: float, _done: int, _total: int) -> None:
    """Progress that nobody follows."""


async def bring_up(loop: Loop, name: str) -> None:
    """The model serves. Raises Refused with the reason when it does not."""
    loop.post(LoadAsked(name))
    asked = loop.posted
    config = loop.state.config
    model = loop.state.models[name].config
    # room has to be made first: other models' drains and parking, then the start itself
    patience = (
        config.policy.min_active_secs
        + config.policy.drain_timeout_secs
        + model.sleep_timeout_secs
        + model.wake_timeout_secs
        + config.startup_timeout(model)
    )

    def settled(state: State) -> bool:
        record = state.models.get(name)
        if record is None or isinstance(record.phase, Serving):
            return True
        return loop.handled >= asked and name not in state.wants and not _on_its_way(state, name)

    try:
        state = await loop.wait_for(settled, patience)
    except TimeoutError:
        raise Refused(
            Reason.WAIT_EXPIRED, f"cannot load {name}: not serving after {patience:g} s"
        ) from None
    record = state.models.get(name)
    if record is None or not isinstance(record.phase, Serving):
        message = record.phase.message if record and isinstance(record.phase, Failed) else ""
        raise Refused(Reason.START_FAILED, f"cannot load {name}: {message or 'it was not started'}")


async def bring_down(loop: Loop, name: str, eviction: Eviction | None) -> ModelRecord | None:
    """The model is parked or stopped; None = by its own eviction. What became of it is in the
    record; None when it is no longer configured."""
    loop.post(ParkAsked(name, eviction))
    asked = loop.posted
    config = loop.state.config
    model = loop.state.models[name].config
    patience = config.policy.drain_timeout_secs + model.sleep_timeout_secs + 120.0
    if not isinstance(loop.state.models[name].phase, Serving):
        patience += config.startup_timeout(model)

    def settled(state: State) -> bool:
        record = state.models.get(name)
        if record is None:
            return True
        at_rest = isinstance(record.phase, (Stopped, Parked, Failed))
        return loop.handled >= asked and at_rest

    try:
        state = await loop.wait_for(settled, patience)
    except TimeoutError:
        raise Refused(
            Reason.WAIT_EXPIRED, f"cannot park {name}: not parked after {patience:g} s"
        ) from None
    return state.models.get(name)


def _on_its_way(state: State, name: str) -> bool:
    record = state.models[name]
    return not isinstance(record.phase, (Stopped, Parked, Failed)) or name in state.reservations


@asynccontextmanager
async def followed(loop: Loop, name: str, tell: Tell) -> AsyncIterator[None]:
    """While this lasts ``tell`` hears of every step of the model's operations, and each second."""
    began = monotonic()
    last: tuple[str, int, int] = ("wait", 0, 0)

    def follow(phase: str, done: int, total: int) -> None:
        nonlocal last
        last = (phase, done, total)
        tell(phase, monotonic() - began, done, total)

    async def beat() -> None:
        while True:
            follow(*last)
            await asyncio.sleep(HEARTBEAT_SECS)

    instance = loop.executor.instance(loop.state.models[name].config)
    instance.follower = follow
    beating = asyncio.create_task(beat(), name=f"progress of {name}")
    try:
        yield
    finally:
        if instance.follower is follow:
            instance.follower = None
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating
