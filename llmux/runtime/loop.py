"""The single owner of the state: take the events, reduce, note down, publish, hand out effects.

Nothing else writes the state; a change is asked for by posting an event. The loop never awaits a
driver: slow work runs in the executor and comes back as an event. All events that have arrived are
applied before one decision is made, and the loop yields after each: however many events come, the
drivers, the sockets and the watchdog get their turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import monotonic
from typing import Protocol

from llmux.core.effects import (
    DropAhead,
    Effect,
    EndReading,
    OrderAnswered,
    Probe,
    ReadAhead,
    ReadWeights,
    RestoreAhead,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
    SwitchFinished,
)
from llmux.core.events import Event, LoadAsked, ModeSet, ParkAsked, Tick
from llmux.core.records import Failed, Starting, State, Stopped, Stopping
from llmux.core.reducer import reduce_all
from llmux.errors import Reason, StateFileError
from llmux.ports import StateStore
from llmux.protocol import Cut, Grant, Message, Refuse, Revoke
from llmux.runtime.engines.executor import Executor
from llmux.runtime.notes import notes_of

log = logging.getLogger("llmux")

SAVE_AGAIN_SECS = 5.0  # after a failed write of the notes


class Listeners(Protocol):
    """What the loop notifies of its results: metrics, the catalogue of the workers, STATUS."""

    def published(self, old: State, new: State) -> None: ...
    def switched(self, switch: SwitchFinished) -> None: ...


class Loop:
    """``send`` delivers a message to a gateway worker; a worker that is gone is not an error."""

    def __init__(
        self,
        state: State,
        *,
        executor: Callable[[Callable[[Event], None]], Executor],
        store: StateStore,
        send: Callable[[str, Message], None],
    ) -> None:
        self.state = state
        self.executor = executor(self.post)
        self._store = store
        self._send = send
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._orders: dict[int, asyncio.Future[OrderAnswered]] = {}
        self._next_order = 1
        self._waiters: set[tuple[Callable[[State], bool], asyncio.Future[State]]] = set()
        self.listeners: list[Listeners] = []
        self.last_switches: dict[str, SwitchFinished] = {}  # by the model made resident
        self.wanting: Counter[str] = Counter()  # operators' loads that wait, by model
        self._lent: ModeSet | None = None
        self._unsaved: asyncio.TimerHandle | None = None  # set while notes cannot be written
        self.turned = 0  # decisions made, ticks included; the watchdog is fed by this

    @property
    def pending(self) -> int:
        """Events posted and not applied yet."""
        return len(self._events)

    def post(self, event: Event) -> None:
        """Callable from anywhere in the event loop; events are handled in order."""
        self._events.append(event)
        self._arrived.set()

    async def order(self, order: LoadAsked | ParkAsked) -> OrderAnswered:
        """Post an operator's order; returns the core's answer, with the state that it led to
        published."""
        number, self._next_order = self._next_order, self._next_order + 1
        future: asyncio.Future[OrderAnswered] = asyncio.get_running_loop().create_future()
        self._orders[number] = future
        self.post(replace(order, order=number))
        try:
            return await future
        finally:
            del self._orders[number]

    def lend_mode(self, mode: ModeSet) -> ModeSet:
        """Override the mode for a while. Returns the mode to post in the end, which is also what
        the notes record meanwhile, for a successor."""
        before = mode_of(self.state)
        if mode != before:
            self._lent = before
        self.post(mode)
        return before

    async def run(self) -> None:
        """Runs until cancelled. An exception (InvariantError included) ends the process; systemd
        restarts it."""
        while True:
            self._handle(await self._arrivals())
            await asyncio.sleep(0)

    async def _arrivals(self) -> list[Event]:
        """All events posted since the last decision; a Tick when the time for one has come."""
        wakeup = self.state.wakeup
        timeout = None if wakeup is None else max(0.0, wakeup - monotonic())
        if not self._events:
            try:
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
            except TimeoutError:
                return [Tick()]
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    def _handle(self, events: list[Event]) -> None:
        self.turned += 1
        state, effects = reduce_all(self.state, events, monotonic())
        self.enter(state, effects)

    def enter(self, state: State, effects: Iterable[Effect]) -> None:
        """Make ``state`` the present one and hand its effects out. Notes are written first, so
        that a successor after a crash knows what was begun."""
        old, self.state = self.state, state
        if mode_of(state) == self._lent and mode_of(old) != self._lent:
            self._lent = None
        if phases_changed(old, state):
            self._save()
            _log_transitions(old, state)
        elif orders_changed(old, state):
            self._save()
        self._tell(lambda listener: listener.published(old, state))
        for effect in effects:
            self._perform(effect)
        for waiter in list(self._waiters):
            predicate, future = waiter
            if not future.done() and predicate(state):
                future.set_result(state)

    def _tell(self, what: Callable[[Listeners], None]) -> None:
        """None of them may end the loop, or keep a state from the others."""
        for listener in self.listeners:
            try:
                what(listener)
            except Exception:
                log.exception("cannot tell %s what changed", type(listener).__name__)

    def _save(self) -> None:
        """Write the notes. They are only a hint: what cannot be written now is written later."""
        mode = self._lent or mode_of(self.state)
        try:
            self._store.save(notes_of(self.state, self.executor, mode))
        except StateFileError as error:
            if self._unsaved is None:
                log.error("%s", error)
            else:
                self._unsaved.cancel()
            loop = asyncio.get_running_loop()
            self._unsaved = loop.call_later(SAVE_AGAIN_SECS, self._save)
            return
        if self._unsaved is not None:
            self._unsaved.cancel()
            self._unsaved = None
            log.info("the state file is written again")

    def _perform(self, effect: Effect) -> None:
        match effect:
            case RunPlan():
                self.executor.run(effect)
            case Probe():
                self.executor.probe(effect)
            case ReadAhead():
                self.executor.read_ahead(effect)
            case ReadWeights():
                self.executor.read_weights(effect)
            case EndReading(model):
                self.executor.end_reading(model)
            case RestoreAhead():
                self.executor.restore_ahead(effect)
            case DropAhead():
                self.executor.drop_ahead(effect)
            case SendGrant(worker, model, epoch):
                address = self.executor.instances[model].facts.address
                assert address is not None
                self._send(worker, Grant(model, epoch, address.uds, address.port))
            case SendRevoke(worker, model, epoch, dead):
                self._send(worker, Revoke(model, epoch, dead))
            case SendCut(worker, model, epoch, error):
                text = f'model "{model}" had to make room before this answer was complete'
                code = Reason.CUT_BY_SWITCH if error is None else Reason.ENGINE_DIED
                self._send(worker, Cut(model, epoch, code.value, error or text))
            case SendRefuse(worker, model, reason, message, retry_after):
                self._send(worker, Refuse(model, reason, message, retry_after))
            case SwitchFinished():
                self.last_switches[effect.model] = effect
                self._tell(lambda listener: listener.switched(effect))
            case OrderAnswered(order):
                future = self._orders.get(order)
                if future is not None and not future.done():
                    future.set_result(effect)

    async def wait_for(self, predicate: Callable[[State], bool], seconds: float) -> State:
        """The first published state for which ``predicate`` holds; TimeoutError after that."""
        if predicate(self.state):
            return self.state
        future: asyncio.Future[State] = asyncio.get_running_loop().create_future()
        waiter = (predicate, future)
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await future
        finally:
            self._waiters.discard(waiter)


def mode_of(state: State) -> ModeSet:
    return ModeSet(state.manual, state.pinned)


def phases_changed(old: State, new: State) -> bool:
    return old.models.keys() != new.models.keys() or any(
        record.phase is not old.models[name].phase for name, record in new.models.items()
    )


def orders_changed(old: State, new: State) -> bool:
    """What operators ordered is to outlive us even when no model moves for it."""
    if mode_of(old) != mode_of(new) or old.pins != new.pins:
        return True
    return any(
        record.eviction_override != old.models[name].eviction_override
        for name, record in new.models.items()
        if name in old.models
    )


def _log_transitions(old: State, new: State) -> None:
    """One line per transition, with its reason, and one for a model that is gone."""
    for name in old.models.keys() - new.models.keys():
        log.info("%s: gone, it was removed from the configuration", name, extra={"model": name})
    for name, record in new.models.items():
        before = old.models[name].state if name in old.models else None
        if before is record.state:
            continue
        phase = record.phase
        reason = ""
        if isinstance(phase, (Stopped, Stopping, Starting)):
            reason = phase.reason
        elif isinstance(phase, Failed):
            reason = phase.message
        level = logging.WARNING if isinstance(phase, Failed) else logging.INFO
        log.log(
            level,
            "%s: %s → %s%s",
            name,
            before or "unknown",
            record.state,
            f" ({reason})" if reason else "",
            extra={
                "model": name,
                "from": str(before or "unknown"),
                "to": str(record.state),
                "reason": reason,
            },
        )
