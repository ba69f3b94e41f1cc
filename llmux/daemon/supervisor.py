"""The supervisor of all modes: loop, executor, control socket and verbs around a set of drivers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import time
from typing import Any

from llmux import __version__
from llmux.config.diff import diff_config
from llmux.config.schema import Config
from llmux.core.effects import Effect, SwitchFinished
from llmux.core.events import ConfigChanged
from llmux.core.records import State
from llmux.drivers.engine.output import EngineFiles
from llmux.errors import ConfigError, DriverError, LlmuxError, Reason, Refused, StateFileError
from llmux.ports import EventStore, StateStore
from llmux.protocol import Ask, Catalog, Collect, ProgressCallback
from llmux.runtime.arrivals import ArrivalLog
from llmux.runtime.control.event_log import EventLog
from llmux.runtime.control.socket import ControlSocket
from llmux.runtime.control.status import catalog
from llmux.runtime.control.telemetry import Telemetry
from llmux.runtime.control.verbs import Verbs
from llmux.runtime.control.watchers import Watchers
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.host import Drivers
from llmux.runtime.learned import Learned
from llmux.runtime.loop import Loop
from llmux.runtime.reconcile import adopt_engines, first_state

log = logging.getLogger("llmux")

GATEWAY_USER = "llmux"
THAW_SECS = 2.0  # measured 0.1 ms
TAKEOVER_SECS = 60.0  # for an order that runs without a supervisor to finish


class Supervisor:
    """Loop, executor, control socket and verbs around a set of drivers."""

    def __init__(
        self,
        config: Config,
        drivers: Drivers,
        store: StateStore,
        reload: Callable[[bool], Config],
        allowed_uids: frozenset[int] = frozenset(),
        admins: int | None = None,
        events: EventStore | None = None,
        learned: StateStore | None = None,
    ) -> None:
        """``events``: keeps the events for the next supervisor; None where none follows.
        ``learned``: what was seen of engines' memory, over a reboot."""
        self.drivers = drivers
        self.watchers = Watchers()
        self.events = EventLog(self.watchers, events)
        self.telemetry = Telemetry(
            __version__, drivers.gpu, drivers.checkpointer, self._engine_pids
        )
        if isinstance(drivers.output, EngineFiles):
            drivers.output.on_line = self._line
            drivers.output.on_progress = lambda model, text: self.loop.executor.heard(model, text)
        self._config = config.resolved()
        self._store = store
        self._learned = Learned(learned, drivers.places) if learned is not None else None
        self._load = reload
        self._uids = allowed_uids
        self._admins = admins
        self._began = time()
        self.images: ImageLifecycle
        self.loop: Loop
        self.control_socket: ControlSocket
        self.verbs: Verbs

    async def start(self) -> None:
        """Adopt running engines. Then the state is true, and the control socket may listen."""
        await self.prepare()
        try:
            notes = self._store.load()
        except StateFileError as error:
            log.warning("%s; relying on observation", error)
            notes = {}
        adopted, effects = await self._adopt(notes)
        self.events.resume()
        self.loop.enter(adopted, effects)
        self.events.adopted(adopted)

    async def _adopt(self, notes: Mapping[str, Any]) -> tuple[State, tuple[Effect, ...]]:
        """What fails with the notes and not without them comes of them: a next start with the same
        notes would fail as well."""
        parts = self.loop.state, self.loop.executor, self.images, self.drivers
        try:
            return await adopt_engines(*parts, notes)
        except LlmuxError:
            raise  # a driver's word
        except Exception as error:
            if not notes:
                raise
            adopted = await adopt_engines(*parts, {})
            unusable = self._store.put_aside(f"{type(error).__name__}: {error}")
            log.error("%s; relying on observation", unusable, exc_info=error)
            return adopted

    async def prepare(self) -> None:
        """Build everything without observing any engine: enough to list images."""
        state = await first_state(self._config, self.drivers)
        if self._learned is not None:
            state = self._learned.recall(state)
        self.loop = Loop(state, executor=self._executor, store=self._store, send=self._send)
        self.verbs = Verbs(self.loop, self.loop.executor, self.images, self.drivers, self.reload)
        self.verbs.orders.tell = self.events.ordered
        self.control_socket = ControlSocket(
            post=self.loop.post,
            ask=self._answer,
            catalog=lambda: self.catalog(self.loop.state),
            allowed_uids=self._uids,
            admins=self._admins,
            watchers=self.watchers,
        )
        self.loop.listeners += [_Catalogue(self), self.telemetry, self.events, ArrivalLog()]
        if self._learned is not None:
            self.loop.listeners.append(self._learned)

    def catalog(self, state: State) -> Catalog:
        return catalog(state, self.loop.executor, self.loop.last_switches, self._began)

    def _executor(self, post: Callable[[Any], None]) -> Executor:
        self.images = ImageLifecycle(self.drivers, post, self.telemetry.quarantined)
        return Executor(self.drivers, self.images, post, self.telemetry.stepped)

    async def _engine_pids(self) -> set[int]:
        handles = [instance.handle for instance in self.loop.executor.instances.values()]
        return {
            pid
            for handle in handles
            if handle is not None
            for pid in await self.drivers.units.pids(handle)
        }

    def _line(self, model: str, text: str) -> None:
        self.watchers.line(model, text)
        self.loop.executor.heard(model, text)

    async def _answer(self, ask: Ask, report: ProgressCallback) -> object:
        if ask.verb == "alive":
            return None  # to be answered is all that it is for
        if ask.verb == "events":
            return self.events.answer(ask.args)
        if ask.verb == "response":
            return self.control_socket.responses.answer(ask.args)
        if ask.verb == "metrics":
            control = self.control_socket
            return await self.telemetry.answer(
                ask.args, self.watchers, control.workers(), lambda w, n: control.send(w, Collect(n))
            )
        return await self.verbs.answer(ask, report)

    def _send(self, worker: str, message: Any) -> None:
        self.control_socket.send(worker, message)

    async def reload(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Re-read the configuration; with a mistake in the file the present one stays in force.
        ``dry_run``: only report what would change."""
        old = self.loop.state.config
        try:
            new = self._load(dry_run).resolved()
        except ConfigError as error:
            log.error("configuration not reloaded, the former one stays in force: %s", error)
            raise Refused(Reason.BAD_REQUEST, str(error)) from error
        difference = diff_config(old, new)
        running = {
            name for name, one in self.loop.executor.instances.items() if one.handle is not None
        }
        result = {
            "message": "nothing was changed (dry run)" if dry_run else "configuration reloaded",
            "added": list(difference.added),
            "removed": list(difference.removed),
            "changed": [change.name for change in difference.changed],
            "restart_models": [
                one.name for one in difference.changed if one.engine_restart and one.name in running
            ],
            "restart_gateway_for": list(difference.gateway_restart),
            "restart_supervisor_for": list(difference.supervisor_restart),
        }
        if not dry_run:
            self.loop.post(ConfigChanged(new))
            log.info(
                "configuration reloaded: %d added, %d removed, %d changed",
                len(difference.added),
                len(difference.removed),
                len(difference.changed),
            )
            for line in reload_needs(result):
                log.warning("%s", line)
        return result

    async def thaw_if_ending(self) -> None:
        """Thaw frozen engines when everything is being stopped, so that SIGTERM reaches them. Best
        effort: systemd kills the rest at its timeout."""
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

    async def tell_what_goes_on(self) -> None:
        """A stop of the supervisor alone stops nothing that an operator cares about."""
        running = [one for one in self.loop.executor.instances.values() if one.handle is not None]
        try:
            if not running or await self.drivers.units.ending():
                return
        except DriverError as error:
            log.warning("cannot ask what else is being stopped: %s", error)
            return
        log.warning(
            "stopped; the engines of %s go on, and a gateway that runs serves them:"
            " `systemctl stop llmux.slice` ends everything",
            ", ".join(one.config.name for one in running),
        )

    async def close(self) -> None:
        await self.verbs.orders.close()
        await self.control_socket.close()
        await self.loop.executor.close()
        if self.drivers.cuda is not None:
            await self.drivers.cuda.close()
        await self.drivers.units.close()


def reload_needs(result: Mapping[str, Any]) -> list[str]:
    """What a reload could not put in force, and the command that does."""
    needs = []
    if models := result.get("restart_models"):
        names = " ".join(models)
        needs.append(f"running engines keep their arguments until `llmux restart {names}`")
    for unit, service in (("gateway", "llmux-gateway"), ("supervisor", "llmux")):
        if settings := result.get(f"restart_{unit}_for"):
            listed = ", ".join(settings)
            needs.append(f"not in force before `systemctl restart {service}`: {listed}")
    return needs


class _Catalogue:
    """Send the catalog to the workers when a model's state changes."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._last: object = None

    def published(self, old: State, new: State) -> None:
        supervisor = self._supervisor
        now = supervisor.catalog(new)
        if now != self._last:
            self._last = now
            supervisor.control_socket.broadcast(now)

    def switched(self, switch: SwitchFinished) -> None:
        victims = ", ".join(switch.victims)
        total = switch.serving_at - switch.decided_at
        waited = ""
        if switch.behind:
            kept = ", ".join(switch.behind)
            waited = f", after {switch.waited_secs:.3f} s behind {kept}, pinned or by never_evict"
        log.info(
            "%s serves after %.3f s (%s%s; drain %.3f s, park %.3f s, %s %.3f s)%s",
            switch.model,
            total,
            "cold" if switch.cold else "woken",
            f", in place of {victims}" if victims else "",
            switch.drained_at - switch.decided_at,
            switch.room_at - switch.drained_at,
            "start" if switch.cold else "wake",
            switch.serving_at - switch.room_at,
            waited,
            extra={"model": switch.model, "duration_ms": round(total * 1000, 1)},
        )
