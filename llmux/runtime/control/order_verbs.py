"""The verbs that move models: each goes through the core as an event and waits for what follows."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Any

from llmux.config.schema import Eviction, Process
from llmux.core.events import ModeSet, PinSet
from llmux.core.records import Draining, Failed, Serving, Stopped
from llmux.errors import Reason, Refused
from llmux.runtime.control.arguments import Arguments
from llmux.runtime.control.order_book import Order
from llmux.runtime.control.orders import bring_down, bring_up, record_of
from llmux.runtime.control.status import process_state
from llmux.runtime.engines.executor import Executor
from llmux.runtime.loop import Loop
from llmux.typed_json import LARGEST_INT

OrderVerb = Callable[[Mapping[str, Any], Order], Awaitable[Any]]


class OrderVerbs:
    def __init__(self, loop: Loop, executor: Executor, arguments: Arguments) -> None:
        self._loop = loop
        self._executor = executor
        self._arguments = arguments
        self.table: Mapping[str, OrderVerb] = {
            "load": self._load,
            "wake": self._load,
            "switch": self._switch,
            "unload": self._unload,
            "restart": self._restart,
            "sleep": self._sleep,
            "pin": self._pin,
        }

    def models(self, verb: str, args: Mapping[str, Any]) -> list[str]:
        """The models that the order is about. Raises Refused for unknown ones."""
        names = args.get("models")
        if "model" in args or (verb == "pin" and names is None):
            return [self._arguments.model(args)]
        if verb not in ("restart", "pin"):
            return [self._arguments.model(args)]
        if args.get("stale") is True:
            records = self._loop.state.models
            names = [name for name, record in records.items() if self._executor.stale(record)]
        if not isinstance(names, list):
            raise Refused(Reason.BAD_REQUEST, f'cannot {verb}: "models" must be a list of names')
        return self._arguments.models(names)

    async def _load(self, args: Mapping[str, Any], order: Order) -> Any:
        name = self._arguments.model(args)
        await bring_up(self._loop, name, order.accepted.set)
        return {"message": f"Model {name} is serving"}

    async def _switch(self, args: Mapping[str, Any], order: Order) -> Any:
        name = self._arguments.model(args)
        state = self._loop.state
        if state.manual and state.pinned is not None:
            self._loop.post(ModeSet(True, name))
        await bring_up(self._loop, name, order.accepted.set)
        return {"message": f"Switched to model: {name}"}

    async def _unload(self, args: Mapping[str, Any], order: Order) -> Any:
        name = self._arguments.model(args)
        await self._stop(name, order)
        return {"message": f"Model {name} is stopped"}

    async def _stop(self, name: str, order: Order) -> None:
        weights = record_of(self._loop, name).eviction.weights
        eviction = Eviction(weights, Process.STOP)
        record = await bring_down(self._loop, name, eviction, order.accepted.set)
        if record is not None and not isinstance(record.phase, Stopped):
            detail = record.phase.message if isinstance(record.phase, Failed) else record.state
            raise Refused(Reason.START_FAILED, f"cannot stop {name}: {detail}")

    async def _restart(self, args: Mapping[str, Any], order: Order) -> Any:
        """Stop engines after a drain, so that they start as configured now; those that served are
        started again."""
        restarted = [name for name in order.models if await self._restart_one(name, order)]
        left = self._loop.state.models  # a reload may have removed some meanwhile
        idle = [name for name in order.models if name in left and name not in restarted]
        said = f"restarted: {', '.join(restarted)}" if restarted else "nothing was restarted"
        if idle:
            said += f"; they start as configured when they are asked for: {', '.join(idle)}"
        return {"message": said, "restarted": restarted, "stopped": idle}

    async def _restart_one(self, name: str, order: Order) -> bool:
        """True when the model serves again; one that did not serve is stopped."""
        record = self._loop.state.models.get(name)
        if record is None:
            return False
        served = isinstance(record.phase, (Serving, Draining))
        await self._stop(name, order)
        if not served or name not in self._loop.state.models:
            return False
        await bring_up(self._loop, name)
        return True

    async def _sleep(self, args: Mapping[str, Any], order: Order) -> Any:
        name = self._arguments.model(args)
        eviction = self._arguments.eviction(args)
        self._arguments.check_parking(name, eviction)
        await bring_down(self._loop, name, eviction, order.accepted.set)
        record = record_of(self._loop, name)
        return {"message": f"Model {name} is {record.state}", "state": process_state(record)}

    async def _pin(self, args: Mapping[str, Any], order: Order) -> Any:
        """``models``: each stays resident, in either mode, for ``seconds`` if given. ``model``
        alone, as the earlier system had it: manual mode around that model."""
        if "models" not in args:
            return await self._pin_mode(self._arguments.model(args), order)
        seconds = args.get("seconds")
        if seconds is not None and not (_is_number(seconds) and 0 < seconds <= LARGEST_INT):
            raise Refused(Reason.BAD_REQUEST, f'"seconds" must be above 0, not {seconds!r}')
        for name in order.models:
            before = self._loop.state.pins.get(name)
            until = math.inf if seconds is None else monotonic() + seconds
            self._loop.post(PinSet(name, until))
            try:
                await bring_up(self._loop, name, order.accepted.set)
            except BaseException:
                self._loop.post(PinSet(name, before))  # no pin without a serving model
                raise
        held = "" if seconds is None else f" for {seconds:g} s"
        return {"message": f"Pinned{held}: {', '.join(order.models)}"}

    async def _pin_mode(self, name: str, order: Order) -> Any:
        before = self._loop.state
        self._loop.post(ModeSet(True, name))
        try:
            await bring_up(self._loop, name, order.accepted.set)
        except BaseException:
            self._loop.post(ModeSet(before.manual, before.pinned))  # no pin without a serving model
            raise
        return {"message": f"Pinned to model: {name}"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
