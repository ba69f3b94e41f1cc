"""The verbs of the control socket: what operators ask, answered from the published state.

Every order goes through the core as an event; the answer says what became of it, observed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from llmux.config.schema import Eviction, Process
from llmux.core.events import EvictionSet, LoadAsked, ModeSet, ParkAsked
from llmux.core.records import Failed, Parked, Serving, State, Stopped
from llmux.errors import Reason, Refused
from llmux.ports import EngineOutput
from llmux.protocol import Ask
from llmux.runtime.loop import Loop
from llmux.runtime.status import process_state, status
from llmux.runtime.words import parse_eviction


class Verbs:
    """``reload`` re-reads the configuration and says what changed."""

    def __init__(
        self, loop: Loop, output: EngineOutput, reload: Callable[[], Awaitable[Any]]
    ) -> None:
        self._loop = loop
        self._output = output
        self._reload = reload
        self._table: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Any]]] = {
            "status": self._status,
            "load": self._load,
            "wake": self._load,
            "switch": self._switch,
            "unload": self._unload,
            "sleep": self._sleep,
            "mode": self._mode,
            "pin": self._pin,
            "unpin": self._unpin,
            "eviction_get": self._eviction_get,
            "eviction_set": self._eviction_set,
            "logs": self._logs,
            "reload": self._reload_config,
        }

    async def answer(self, ask: Ask) -> Any:
        verb = self._table.get(ask.verb)
        if verb is None:
            raise Refused(Reason.BAD_REQUEST, f"cannot do {ask.verb!r}: no such verb")
        return await verb(ask.args)

    # ---- arguments ------------------------------------------------------------------------------

    def _model(self, args: Mapping[str, Any]) -> str:
        name = args.get("model")
        if not isinstance(name, str):
            raise Refused(Reason.BAD_REQUEST, 'cannot act: "model" is missing or not a string')
        if name not in self._loop.state.models:
            raise Refused(Reason.UNKNOWN_MODEL, f"Model not found: {name}")
        return name

    def _eviction(self, args: Mapping[str, Any]) -> Eviction | None:
        value = args.get("eviction")
        if value is None:
            return None
        if isinstance(value, dict):
            value = f"{value.get('weights')}+{value.get('process')}"
        try:
            return parse_eviction(str(value))
        except ValueError as error:
            raise Refused(Reason.BAD_REQUEST, f"cannot read the eviction: {error}") from error

    # ---- verbs ----------------------------------------------------------------------------------

    async def _status(self, args: Mapping[str, Any]) -> Any:
        return status(self._loop.state, self._loop.executor, self._loop.last_switches)

    async def _load(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        await self._bring_up(name)
        return {"message": f"Model {name} is serving"}

    async def _switch(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        state = self._loop.state
        if state.manual and state.pinned is not None:
            self._loop.post(ModeSet(True, name))
        await self._bring_up(name)
        return {"message": f"Switched to model: {name}"}

    async def _bring_up(self, name: str) -> None:
        self._loop.post(LoadAsked(name))
        asked = self._loop.posted
        config = self._loop.state.config
        model = self._loop.state.models[name].config
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
            return (
                self._loop.handled >= asked
                and name not in state.wants
                and not _on_its_way(state, name)
            )

        try:
            state = await self._loop.wait_for(settled, patience)
        except TimeoutError:
            raise Refused(
                Reason.WAIT_EXPIRED, f"cannot load {name}: not serving after {patience:g} s"
            ) from None
        record = state.models.get(name)
        if record is None or not isinstance(record.phase, Serving):
            message = record.phase.message if record and isinstance(record.phase, Failed) else ""
            raise Refused(
                Reason.START_FAILED, f"cannot load {name}: {message or 'it was not started'}"
            )

    async def _unload(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        weights = self._loop.state.models[name].eviction.weights
        await self._bring_down(name, Eviction(weights, Process.STOP))
        return {"message": f"Model {name} is stopped"}

    async def _sleep(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        eviction = self._eviction(args)
        await self._bring_down(name, eviction)
        record = self._loop.state.models[name]
        return {"message": f"Model {name} is {record.state}", "state": process_state(record)}

    async def _bring_down(self, name: str, eviction: Eviction | None) -> None:
        self._loop.post(ParkAsked(name, eviction))
        asked = self._loop.posted
        config = self._loop.state.config
        model = self._loop.state.models[name].config
        patience = config.policy.drain_timeout_secs + model.sleep_timeout_secs + 120.0
        if not isinstance(self._loop.state.models[name].phase, Serving):
            patience += config.startup_timeout(model)

        def settled(state: State) -> bool:
            record = state.models.get(name)
            if record is None:
                return True
            at_rest = isinstance(record.phase, (Stopped, Parked, Failed))
            return self._loop.handled >= asked and at_rest

        try:
            await self._loop.wait_for(settled, patience)
        except TimeoutError:
            raise Refused(
                Reason.WAIT_EXPIRED, f"cannot park {name}: not parked after {patience:g} s"
            ) from None

    async def _mode(self, args: Mapping[str, Any]) -> Any:
        mode = args.get("mode")
        if mode not in ("auto", "manual"):
            raise Refused(Reason.BAD_REQUEST, f'mode must be "auto" or "manual", not {mode!r}')
        self._loop.post(ModeSet(mode == "manual", None))
        return {"message": f"Mode set to {mode}"}

    async def _pin(self, args: Mapping[str, Any]) -> Any:
        name = self._model(args)
        before = self._loop.state
        self._loop.post(ModeSet(True, name))
        try:
            await self._bring_up(name)
        except Refused:
            self._loop.post(ModeSet(before.manual, before.pinned))  # no pin that nobody serves
            raise
        return {"message": f"Pinned to model: {name}"}

    async def _unpin(self, args: Mapping[str, Any]) -> Any:
        self._loop.post(ModeSet(False, None))
        return {"message": "Unpinned; mode set to auto"}

    async def _eviction_get(self, args: Mapping[str, Any]) -> Any:
        models = {
            name: {
                "eviction": {
                    "weights": record.eviction.weights.value,
                    "process": record.eviction.process.value,
                },
                "process_state": process_state(record),
            }
            for name, record in self._loop.state.models.items()
        }
        return {"models": models}

    async def _eviction_set(self, args: Mapping[str, Any]) -> Any:
        name, eviction = self._model(args), self._eviction(args)
        if eviction is None:
            raise Refused(Reason.BAD_REQUEST, 'cannot set the eviction: "eviction" is missing')
        self._loop.post(EvictionSet(name, eviction))
        return {"message": f"Eviction of {name} set to {eviction}"}

    async def _logs(self, args: Mapping[str, Any]) -> Any:
        lines = args.get("lines", 100)
        if not isinstance(lines, int) or lines < 1:
            raise Refused(Reason.BAD_REQUEST, f"cannot show {lines!r} lines: a whole number > 0")
        return {"lines": self._output.tail(self._model(args), lines)}

    async def _reload_config(self, args: Mapping[str, Any]) -> Any:
        return await self._reload()


def _on_its_way(state: State, name: str) -> bool:
    record = state.models[name]
    return not isinstance(record.phase, (Stopped, Parked, Failed)) or name in state.reservations
