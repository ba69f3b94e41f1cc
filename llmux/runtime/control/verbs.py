"""The verbs of the control socket, answered from the published state.

Every order goes through the core as an event; the answer is what was then observed.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from llmux.core.events import EvictionSet, ModeSet, PinSet
from llmux.errors import Reason, Refused
from llmux.printable import clean
from llmux.protocol import MAX_LINE, Ask, ProgressCallback
from llmux.runtime.control.arguments import Arguments
from llmux.runtime.control.checkpoints import Checkpoints
from llmux.runtime.control.holdings import Holdings
from llmux.runtime.control.order_book import OrderBook, Work
from llmux.runtime.control.order_verbs import OrderVerbs
from llmux.runtime.control.orders import ignore_progress
from llmux.runtime.control.status import process_state, status
from llmux.runtime.control.transfers import Transfers
from llmux.runtime.control.validation import Validation
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.images import ImageLifecycle
from llmux.runtime.host import Drivers
from llmux.runtime.loop import Loop

LONGEST_NAME = 200  # of who gives an order, in characters

# A verb that takes long enough to report its progress.
LongVerb = Callable[[Mapping[str, Any], ProgressCallback], Awaitable[Any]]


class Verbs:
    """``reload`` re-reads the configuration and returns what changed."""

    def __init__(
        self,
        loop: Loop,
        executor: Executor,
        images: ImageLifecycle,
        drivers: Drivers,
        reload: Callable[..., Awaitable[Any]],
    ) -> None:
        self._loop = loop
        self._executor = executor
        self._drivers = drivers
        self._reload = reload
        self._holdings = Holdings(drivers, executor.instances)
        self._arguments = Arguments(loop, drivers)
        self._order_verbs = OrderVerbs(loop, executor, self._arguments)
        self.orders = OrderBook()
        self._checkpoints = Checkpoints(loop, executor, images, drivers)
        self._transfers = Transfers(loop, images, drivers)
        self._table: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Any]]] = {
            "status": self._status,
            "orders": self._orders,
            "cancel": self._cancel,
            "mode": self._mode,
            "unpin": self._unpin,
            "eviction_get": self._eviction_get,
            "eviction_set": self._eviction_set,
            "logs": self._logs,
            "reload": self._reload_config,
            "images": self._images,
            "image_remove": self._image_remove,
            "image_prune": self._image_prune,
            "image_here": self._image_here,
            "image_adopt": self._image_adopt,
        }
        self._long_verbs: Mapping[str, LongVerb] = {
            "checkpoint": self._checkpoint,
            "restore": self._restore,
            "validate": self._validate,
        }

    async def answer(self, ask: Ask, report: ProgressCallback = ignore_progress) -> Any:
        """``report`` is called with the progress of a long verb."""
        if (verb := self._table.get(ask.verb)) is not None:
            return await verb(ask.args)
        if (long := self._long_verbs.get(ask.verb)) is not None:
            models = [self._arguments.model(ask.args)]
            return await self._order(ask, models, lambda _: long(ask.args, report))
        if (move := self._order_verbs.table.get(ask.verb)) is not None:
            models = self._order_verbs.models(ask.verb, ask.args)
            return await self._order(ask, models, lambda order: move(ask.args, order))
        raise Refused(Reason.BAD_REQUEST, f"cannot do {ask.verb!r}: no such verb")

    async def _order(self, ask: Ask, models: list[str], work: Work) -> Any:
        wait = self._arguments.flag(ask.args, "wait", default=True)
        return await self.orders.carry_out(ask.verb, models, given_by(ask.args), work, wait=wait)

    # ---- verbs ----------------------------------------------------------------------------------

    async def _status(self, args: Mapping[str, Any]) -> Any:
        held = await self._holdings.now()
        return status(
            self._loop.state,
            self._executor,
            self._loop.last_switches,
            self._drivers.gpu.blind,
            held,
            self.orders.listing(),
            self._holdings.gpus,
        )

    async def _orders(self, args: Mapping[str, Any]) -> Any:
        return {"orders": self.orders.listing()}

    async def _cancel(self, args: Mapping[str, Any]) -> Any:
        by, ids = given_by(args), args.get("orders")
        if ids is None:
            cancelled = self.orders.cancel_all(by)
        elif isinstance(ids, list) and all(isinstance(one, int) for one in ids):
            cancelled = self.orders.cancel(ids, by)
        else:
            raise Refused(Reason.BAD_REQUEST, 'cannot cancel: "orders" must be a list of numbers')
        listed = ", ".join(map(str, cancelled))
        return {"message": f"cancelled: {listed}" if listed else "nothing to cancel"}

    async def _mode(self, args: Mapping[str, Any]) -> Any:
        mode = args.get("mode")
        if mode not in ("auto", "manual"):
            raise Refused(Reason.BAD_REQUEST, f'mode must be "auto" or "manual", not {mode!r}')
        self._loop.post(ModeSet(mode == "manual", None))
        return {"message": f"Mode set to {mode}"}

    async def _unpin(self, args: Mapping[str, Any]) -> Any:
        """``models``: these are pinned no more. Without, as the earlier system had it: none is, and
        the mode is automatic."""
        names = args.get("models")
        if names is None:
            names = list(self._loop.state.pins)
            self._loop.post(ModeSet(False, None))
            message = "Unpinned; mode set to auto"
        elif isinstance(names, list):
            names = self._arguments.models(names)
            message = f"Unpinned: {', '.join(names)}"
        else:
            raise Refused(Reason.BAD_REQUEST, 'cannot unpin: "models" must be a list of names')
        for name in names:
            self._loop.post(PinSet(name, None))
        return {"message": message}

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
        name, eviction = self._arguments.model(args), self._arguments.eviction(args)
        if eviction is None:
            raise Refused(Reason.BAD_REQUEST, 'cannot set the eviction: "eviction" is missing')
        self._arguments.check_parking(name, eviction)
        self._loop.post(EvictionSet(name, eviction))
        return {"message": f"Eviction of {name} set to {eviction}"}

    async def _logs(self, args: Mapping[str, Any]) -> Any:
        lines = args.get("lines", 100)
        if not isinstance(lines, int) or lines < 1:
            raise Refused(Reason.BAD_REQUEST, f"cannot show {lines!r} lines: a whole number > 0")
        output, name = self._drivers.output, self._arguments.model(args)
        before = self._arguments.flag(args, "previous", default=False)
        found = output.previous(name, lines) if before else output.tail(name, lines)
        return {"lines": _that_fit(found)}

    async def _reload_config(self, args: Mapping[str, Any]) -> Any:
        dry_run = self._arguments.flag(args, "dry_run", default=False)
        return await (self._reload(dry_run=True) if dry_run else self._reload())

    # ---- checkpoints ----------------------------------------------------------------------------

    async def _images(self, args: Mapping[str, Any]) -> Any:
        return {"images": await self._checkpoints.listing()}

    async def _image_remove(self, args: Mapping[str, Any]) -> Any:
        return await self._checkpoints.remove(self._arguments.model(args))

    async def _image_prune(self, args: Mapping[str, Any]) -> Any:
        return await self._checkpoints.prune()

    async def _image_here(self, args: Mapping[str, Any]) -> Any:
        return await self._transfers.here(self._arguments.model(args), args)

    async def _image_adopt(self, args: Mapping[str, Any]) -> Any:
        return await self._transfers.adopt(self._arguments.model(args))

    async def _checkpoint(self, args: Mapping[str, Any], report: ProgressCallback) -> Any:
        warm_up = self._arguments.flag(args, "warm_up", default=True)
        name, eviction = self._arguments.model(args), self._arguments.eviction(args)
        self._arguments.check_parking(name, eviction)
        return await self._checkpoints.make(name, eviction, warm_up=warm_up, report=report)

    async def _restore(self, args: Mapping[str, Any], report: ProgressCallback) -> Any:
        return await self._checkpoints.restore(self._arguments.model(args), report=report)

    async def _validate(self, args: Mapping[str, Any], report: ProgressCallback) -> Any:
        policies = args.get("policies")
        if not isinstance(policies, list) or not policies:
            raise Refused(Reason.BAD_REQUEST, 'cannot validate: "policies" is missing or empty')
        name = self._arguments.model(args)
        evictions = [self._arguments.eviction({"eviction": policy}) for policy in policies]
        wanted = [one for one in dict.fromkeys(evictions) if one is not None]
        for eviction in wanted:
            self._arguments.check_parking(name, eviction)
        return await Validation(self._loop, self._executor, self._drivers, name, report).run(wanted)


def given_by(args: Mapping[str, Any]) -> str:
    """Who gives an order; the control socket sets it."""
    by = args.get("by")
    return clean(by)[:LONGEST_NAME] if isinstance(by, str) else "an operator"


def _that_fit(lines: list[str]) -> list[str]:
    """The last of them that fit into one message; an engine may write lines without end."""
    room = MAX_LINE // 2
    kept = 0
    for line in reversed(lines):
        room -= len(json.dumps(line)) + 1
        if room < 0:
            break
        kept += 1
    return lines[len(lines) - kept :]
