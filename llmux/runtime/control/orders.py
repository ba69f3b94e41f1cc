"""What operators' orders share: post the event, wait until the state shows it done.

Every order goes through the core as an event; nothing here decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic

from llmux.config.schema import Eviction
from llmux.core.effects import Verdict
from llmux.core.events import LoadAsked, LoadWithdrawn, ParkAsked, ParkWithdrawn
from llmux.core.plans import park_plan
from llmux.core.records import Failed, ModelRecord, Parked, Serving, State, Stopped
from llmux.errors import Reason, Refused
from llmux.protocol import ProgressCallback
from llmux.runtime.engines.executor import Executor
from llmux.runtime.loop import Loop

HEARTBEAT_SECS = 1.0  # a terminal shows the seconds go by
BEHIND_OTHERS_SECS = 120.0  # other models' parking and waking on the same GPUs, before a park


def ignore_progress(_phase: str, _seconds: float, _done: int, _total: int) -> None:
    """For a caller that does not show progress."""


def nothing() -> None:
    """For a caller that need not know when its order was accepted."""


def record_of(loop: Loop, name: str) -> ModelRecord:
    """Raises Refused where a reload has removed the model since the order was taken."""
    record = loop.state.models.get(name)
    if record is None:
        raise Refused(
            Reason.UNKNOWN_MODEL, f'the model "{name}" was removed from the configuration meanwhile'
        )
    return record


async def bring_up(loop: Loop, name: str, accepted: Callable[[], None] = nothing) -> None:
    """The model serves. Raises Refused with the reason when it does not. ``accepted`` is called
    once the core has taken the order; cancelled, the order is withdrawn."""
    answer = await loop.order(LoadAsked(name))
    if answer.verdict is Verdict.REFUSED:
        raise Refused(answer.reason or Reason.START_FAILED, f"cannot load {name}: {answer.message}")
    accepted()
    if answer.verdict is Verdict.ALREADY:
        return
    config = loop.state.config
    model = record_of(loop, name).config
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
        return name not in state.wants and not _on_its_way(state, name)

    loop.wanting[name] += 1
    try:
        state = await loop.wait_for(settled, patience)
    except TimeoutError:
        raise Refused(
            Reason.WAIT_EXPIRED, f"cannot load {name}: not serving after {patience:g} s"
        ) from None
    except asyncio.CancelledError:
        if loop.wanting[name] == 1:  # no other order waits for it
            loop.post(LoadWithdrawn(name))
        raise
    finally:
        loop.wanting[name] -= 1
    record = state.models.get(name)
    if record is None or not isinstance(record.phase, Serving):
        raise Refused(Reason.START_FAILED, f"cannot load {name}: {_why_not(record)}")


async def bring_down(
    loop: Loop, name: str, eviction: Eviction | None, accepted: Callable[[], None] = nothing
) -> ModelRecord | None:
    """The model is parked or stopped; None = by its own eviction. Return its record;
    None when it is no longer configured. ``accepted`` and cancelling are as for ``bring_up``."""
    before = loop.state.models.get(name)  # the order itself may begin a drain
    answer = await loop.order(ParkAsked(name, eviction))
    if answer.verdict is Verdict.REFUSED:
        raise Refused(answer.reason or Reason.START_FAILED, f"cannot park {name}: {answer.message}")
    accepted()
    if answer.verdict is Verdict.ALREADY:
        return loop.state.models.get(name)
    config = loop.state.config
    model = record_of(loop, name).config
    plan = park_plan(model, eviction or model.eviction)
    parking = max(model.sleep_timeout_secs + BEHIND_OTHERS_SECS, plan.deadline)
    patience = config.policy.drain_timeout_secs + parking
    if before is not None and not isinstance(before.phase, Serving):
        patience += config.startup_timeout(model)

    def settled(state: State) -> bool:
        record = state.models.get(name)
        if record is None:
            return True
        at_rest = isinstance(record.phase, (Stopped, Parked, Failed))
        return at_rest and record.park_request is None

    try:
        state = await loop.wait_for(settled, patience)
    except TimeoutError:
        raise Refused(
            Reason.WAIT_EXPIRED, f"cannot park {name}: not parked after {patience:g} s"
        ) from None
    except asyncio.CancelledError:
        loop.post(ParkWithdrawn(name))
        raise
    return state.models.get(name)


def _why_not(record: ModelRecord | None) -> str:
    """Why a model that was to be loaded does not serve."""
    if record is None or record.removed:
        return "it was removed from the configuration"
    if isinstance(record.phase, Failed):
        return record.phase.message
    return f"another order left it {record.state} (`llmux events` says whose)"


def _on_its_way(state: State, name: str) -> bool:
    record = state.models[name]
    return not isinstance(record.phase, (Stopped, Parked, Failed)) or name in state.reservations


@asynccontextmanager
async def followed(
    loop: Loop, executor: Executor, name: str, report: ProgressCallback
) -> AsyncIterator[None]:
    """Call ``report`` at every step of the model's operations, and every second in between."""
    began = monotonic()
    last: tuple[str, int, int] = ("wait", 0, 0)

    def follow(phase: str, done: int, total: int) -> None:
        nonlocal last
        last = (phase, done, total)
        report(phase, monotonic() - began, done, total)

    async def beat() -> None:
        while True:
            follow(*last)
            await asyncio.sleep(HEARTBEAT_SECS)

    instance = executor.instance(record_of(loop, name).config)
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
