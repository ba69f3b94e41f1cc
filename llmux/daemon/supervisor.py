"""Loop, executor, hub and verbs around a set of drivers: the supervisor of all modes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import time
from typing import Any

from llmux import __version__
from llmux.config.diff import diff_config
from llmux.config.schema import Config
from llmux.core.effects import SwitchFinished
from llmux.core.events import ConfigChanged
from llmux.core.records import State
from llmux.drivers.output import EngineFiles
from llmux.errors import ConfigError, DriverError, Reason, Refused, StateFileError
from llmux.ports import StateStore
from llmux.protocol import Ask, Catalog, Collect, Tell
from llmux.runtime.drivers import Drivers
from llmux.runtime.events import EventFeed, Feeds
from llmux.runtime.executor import Executor
from llmux.runtime.hub import Hub
from llmux.runtime.loop import Loop
from llmux.runtime.reconcile import adopt_engines, first_state
from llmux.runtime.status import catalog
from llmux.runtime.telemetry import Telemetry
from llmux.runtime.verbs import Verbs

log = logging.getLogger("llmux")

RUNTIME = "/run/llmux"
SOCKET = f"{RUNTIME}/supervisor.sock"
LAST_GOOD = f"{RUNTIME}/last-good"
GATEWAY_USER = "llmux"
THAW_SECS = 2.0  # measured 0.1 ms
TAKEOVER_SECS = 60.0  # for an order that works without a supervisor to come to its end


class Supervisor:
    """Loop, executor, hub and verbs around a set of drivers; the same in all modes."""

    def __init__(
        self,
        config: Config,
        drivers: Drivers,
        store: StateStore,
        reload: Callable[[], Config],
        allowed_uids: frozenset[int] = frozenset(),
    ) -> None:
        self.drivers = drivers
        self.feeds = Feeds()
        self.events = EventFeed(self.feeds)
        self.telemetry = Telemetry(__version__, drivers.gpu, drivers.dumper)
        if isinstance(drivers.output, EngineFiles):
            drivers.output.on_line = self.feeds.line
        self._config = config
        self._store = store
        self._load = reload
        self._uids = allowed_uids
        self._began = time()
        self.loop: Loop
        self.hub: Hub
        self.verbs: Verbs

    async def start(self) -> None:
        """Adopt what lives. After this the state is true and the hub may be connected."""
        await self.prepare()
        try:
            notes = self._store.load()
        except StateFileError as error:
            log.warning("%s; going by what is observed", error)
            notes = {}
        state = self.loop.state
        adopted, effects = await adopt_engines(state, self.loop.executor, self.drivers, notes)
        self.loop.enter(adopted, effects)

    async def prepare(self) -> None:
        """All there, and nothing looked at or touched yet: enough to list images."""
        state = await first_state(self._config, self.drivers)
        self.loop = Loop(state, executor=self._executor, store=self._store, send=self._send)
        self.verbs = Verbs(self.loop, self.drivers.output, self.reload)
        self.hub = Hub(
            post=self.loop.post,
            ask=self._answer,
            catalog=lambda: self.catalog(self.loop.state),
            allowed_uids=self._uids,
            feeds=self.feeds,
        )
        self.loop.listeners += [_Catalogue(self), self.telemetry, self.events]

    def catalog(self, state: State) -> Catalog:
        return catalog(state, self.loop.executor, self.loop.last_switches, self._began)

    def _executor(self, post: Callable[[Any], None]) -> Executor:
        return Executor(self.drivers, post, self.telemetry.stepped)

    async def _answer(self, ask: Ask, tell: Tell) -> object:
        if ask.verb == "events":
            return {"events": list(self.events.recent)}
        if ask.verb == "response":
            return self.hub.responses.answer(ask.args)
        if ask.verb == "metrics":
            hub = self.hub
            return await self.telemetry.answer(
                ask.args, self.feeds, hub.workers(), lambda w, n: hub.send(w, Collect(n))
            )
        return await self.verbs.answer(ask, tell)

    def _send(self, worker: str, message: Any) -> None:
        self.hub.send(worker, message)

    async def reload(self) -> dict[str, Any]:
        """Read the configuration anew; with a mistake in it the present one stays in force."""
        old = self.loop.state.config
        try:
            new = self._load()
        except ConfigError as error:
            log.error("configuration not reloaded, the former one stays in force: %s", error)
            raise Refused(Reason.BAD_REQUEST, str(error)) from error
        difference = diff_config(old, new)
        self.loop.post(ConfigChanged(new))
        log.info(
            "configuration reloaded: %d added, %d removed, %d changed",
            len(difference.added),
            len(difference.removed),
            len(difference.changed),
        )
        return {
            "message": "configuration reloaded",
            "added": list(difference.added),
            "removed": list(difference.removed),
            "changed": [change.name for change in difference.changed],
            "restart_gateway_for": list(difference.gateway_restart),
            "restart_supervisor_for": list(difference.supervisor_restart),
        }

    async def thaw_if_ending(self) -> None:
        """Everything is being stopped for good: let frozen engines hear it. Best effort, since what
        does not hear it is killed by systemd at its timeout."""
        try:
            if not await self.drivers.units.ending():
                return
            for instance in self.loop.executor.instances.values():
                if instance.handle is not None and await self.drivers.freezer.frozen(
                    instance.handle
                ):
                    await self.drivers.freezer.thaw(instance.handle, THAW_SECS)
        except DriverError as error:
            log.warning("cannot thaw engines before they are stopped: %s", error)

    async def close(self) -> None:
        await self.hub.close()
        await self.loop.executor.close()
        if self.drivers.cuda is not None:
            await self.drivers.cuda.close()
        await self.drivers.units.close()


class _Catalogue:
    """Tells the workers when a model's state changed."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._last: object = None

    def published(self, old: State, new: State) -> None:
        supervisor = self._supervisor
        now = supervisor.catalog(new)
        if now != self._last:
            self._last = now
            supervisor.hub.broadcast(now)

    def switched(self, switch: SwitchFinished) -> None:
        victims = ", ".join(switch.victims)
        total = switch.serving_at - switch.decided_at
        log.info(
            "%s serves after %.3f s (%s%s; drain %.3f s, park %.3f s, %s %.3f s)",
            switch.model,
            total,
            "cold" if switch.cold else "woken",
            f", in place of {victims}" if victims else "",
            switch.drained_at - switch.decided_at,
            switch.room_at - switch.drained_at,
            "start" if switch.cold else "wake",
            switch.serving_at - switch.room_at,
            extra={"model": switch.model, "duration_ms": round(total * 1000, 1)},
        )
