"""The single owner of the state: take an event, reduce, note down, publish, hand out effects.

Nothing else writes the state; whoever wants a change posts an event. The loop never awaits a
driver: slow work runs in the executor and comes back as an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Protocol

from llmux.core.effects import (
    DropAhead,
    Effect,
    Probe,
    ReadAhead,
    RestoreAhead,
    RunPlan,
    SendCut,
    SendGrant,
    SendRefuse,
    SendRevoke,
    SwitchFinished,
)
from llmux.core.events import Event, ModeSet, Tick
from llmux.core.records import Failed, Starting, State, Stopped, Stopping
from llmux.core.reducer import reduce
from llmux.errors import Reason
from llmux.ports import StateStore
from llmux.protocol import Cut, Grant, Message, Refuse, Revoke
from llmux.runtime.executor import Executor
from llmux.runtime.notes import notes_of

log = logging.getLogger("llmux")


class Listeners(Protocol):
    """Who is told what the loop did (metrics, the hub's catalogue, STATUS)."""

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
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._waiters: set[tuple[Callable[[State], bool], asyncio.Future[State]]] = set()
        self.listeners: list[Listeners] = []
        self.last_switches: dict[str, SwitchFinished] = {}  # by the model made resident
        self._lent: ModeSet | None = None
        self.turned = 0  # turns made, ticks included; the watchdog is fed by this
        self.posted = 0
        self.handled = 0  # of those posted: mine is done when this has reached my ``posted``

    def post(self, event: Event) -> None:
        """From anywhere in the event loop; handled in order."""
        self._events.put_nowait(event)
        self.posted += 1

    def lend_mode(self, mode: ModeSet) -> ModeSet:
        """Set it for a while. The one returned is to be posted in the end; should we not live to
        see that, it is the one that a successor finds in the notes."""
        before = mode_of(self.state)
        if mode != before:
            self._lent = before
        self.post(mode)
        return before

    async def run(self) -> None:
        """For ever. An exception (InvariantError included) ends the process; systemd restarts."""
        while True:
            self._handle(await self._next())

    async def _next(self) -> Event:
        wakeup = self.state.wakeup
        if self._events.empty() and wakeup is not None:
            try:
                async with asyncio.timeout(max(0.0, wakeup - monotonic())):
                    event = await self._events.get()
            except TimeoutError:
                return Tick()
        else:
            event = await self._events.get()
        self.handled += 1
        return event

    def _handle(self, event: Event) -> None:
        self.turned += 1
        state, effects = reduce(self.state, event, monotonic())
        self.enter(state, effects)

    def enter(self, state: State, effects: Iterable[Effect]) -> None:
        """Make ``state`` the present one and hand its effects out. Notes are written first, so
        that whoever takes over after a crash knows what was begun."""
        old, self.state = self.state, state
        if mode_of(state) == self._lent and mode_of(old) != self._lent:
            self._lent = None
        if phases_changed(old, state):
            self._store.save(notes_of(state, self.executor, self._lent or mode_of(state)))
            _log_transitions(old, state)
        elif orders_changed(old, state):
            self._store.save(notes_of(state, self.executor, self._lent or mode_of(state)))
        for listener in self.listeners:
            listener.published(old, state)
        for effect in effects:
            self._perform(effect)
        for waiter in list(self._waiters):
            predicate, future = waiter
            if not future.done() and predicate(state):
                future.set_result(state)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case RunPlan():
                self.executor.run(effect)
            case Probe():
                self.executor.probe(effect)
            case ReadAhead():
                self.executor.read_ahead(effect)
            case RestoreAhead():
                self.executor.restore_ahead(effect)
            case DropAhead():
                self.executor.drop_ahead(effect)
            case SendGrant(worker, model, epoch):
                address = self.executor.instances[model].address
                assert address is not None
                self._send(worker, Grant(model, epoch, address.uds, address.port))
            case SendRevoke(worker, model, epoch, dead):
                self._send(worker, Revoke(model, epoch, dead))
            case SendCut(worker, model, epoch):
                text = f'model "{model}" had to make room before this answer was complete'
                self._send(worker, Cut(model, epoch, Reason.CUT_BY_SWITCH.value, text))
            case SendRefuse(worker, model, reason, message, retry_after):
                self._send(worker, Refuse(model, reason, message, retry_after))
            case SwitchFinished():
                self.last_switches[effect.model] = effect
                for listener in self.listeners:
                    listener.switched(effect)

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
    if mode_of(old) != mode_of(new):
        return True
    return any(
        record.eviction_override != old.models[name].eviction_override
        for name, record in new.models.items()
        if name in old.models
    )


def _log_transitions(old: State, new: State) -> None:
    """One line per transition, with its reason."""
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
