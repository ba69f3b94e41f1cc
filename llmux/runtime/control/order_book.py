"""Operators' orders under way: numbered, listed, cancelled by number or with the client that gave
them. The journal and the events say who gave each."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from llmux.errors import LlmuxError, Reason, Refused

log = logging.getLogger("llmux")

# Of the others a part may be done already: they end by their own deadlines.
CANCELLABLE: Final = frozenset({"load", "wake", "switch", "unload", "restart", "sleep", "pin"})


@dataclass(slots=True, eq=False)
class Order:
    """``accepted`` is set when it was not refused at once. ``cancelled_by``: who or what, once it
    was cancelled."""

    id: int
    verb: str
    models: tuple[str, ...]
    by: str
    since: float = field(default_factory=monotonic)
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled_by: str | None = None
    task: asyncio.Task[Any] | None = None

    def __str__(self) -> str:
        return f"{self.verb} {' '.join(self.models)}".rstrip()

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "verb": self.verb,
            "models": list(self.models),
            "by": self.by,
            "since_secs": round(monotonic() - self.since, 3),
            "cancellable": self.verb in CANCELLABLE,
        }


Work = Callable[[Order], Awaitable[Any]]
Tell = Callable[[Order, str], None]


class OrderBook:
    """``tell`` is called with every order and what became of it: "given", "done", "cancelled" or
    the reason of its failure."""

    def __init__(self) -> None:
        self._orders: dict[int, Order] = {}
        self._ids = itertools.count(1)
        self.tell: Tell = lambda _order, _what: None

    def listing(self) -> list[dict[str, Any]]:
        return [order.as_json() for order in self._orders.values()]

    async def carry_out(
        self, verb: str, models: Sequence[str], by: str, work: Work, *, wait: bool
    ) -> Any:
        """Return the work's result; with ``wait`` False the order's number, once it was accepted.
        A caller that is cancelled cancels the order, if it can be."""
        order = Order(next(self._ids), verb, tuple(models), by)
        log.info("order %d: %s, by %s", order.id, order, by, extra=_fields(order))
        self.tell(order, "given")
        self._orders[order.id] = order
        task = order.task = asyncio.create_task(self._run(order, work), name=f"order {order}")
        if not wait:
            accepted = asyncio.create_task(order.accepted.wait())
            await asyncio.wait([task, accepted], return_when=asyncio.FIRST_COMPLETED)
            accepted.cancel()
            if not task.done():
                task.add_done_callback(_unheard)
                return {"message": f"order {order.id} was accepted: {order}", "order": order.id}
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.add_done_callback(_unheard)
            if self._cancel(order, "its client left"):
                await asyncio.gather(task, return_exceptions=True)
            raise
        if task.cancelled():
            raise Refused(Reason.CANCELLED, f"order {order.id} was cancelled: {order.cancelled_by}")
        return task.result()

    async def _run(self, order: Order, work: Work) -> Any:
        try:
            result = await work(order)
        except asyncio.CancelledError:
            order.cancelled_by = order.cancelled_by or "llmux stops"
            log.info("order %d: cancelled, %s", order.id, order.cancelled_by, extra=_fields(order))
            self.tell(order, f"cancelled: {order.cancelled_by}")
            raise
        except LlmuxError as error:
            log.info("order %d: %s", order.id, error, extra=_fields(order))
            self.tell(order, str(error))
            raise
        else:
            self.tell(order, "done")
            return result
        finally:
            del self._orders[order.id]

    def cancel(self, ids: Sequence[int], by: str) -> list[int]:
        """Cancel these orders. Raises Refused for one that is unknown or cannot be cancelled, and
        cancels none then."""
        for number in ids:
            order = self._orders.get(number)
            if order is None:
                raise Refused(
                    Reason.NOT_FOUND,
                    f"cannot cancel order {number}: it has ended or was never given",
                    hint="llmux orders",
                )
            if order.verb not in CANCELLABLE:
                raise Refused(
                    Reason.BAD_REQUEST,
                    f"cannot cancel order {number}: a {order.verb} ends by its own deadlines",
                )
        return [number for number in ids if self._cancel(self._orders[number], f"by {by}")]

    def cancel_all(self, by: str) -> list[int]:
        able = [one.id for one in self._orders.values() if one.verb in CANCELLABLE]
        return self.cancel(able, by)

    @staticmethod
    def _cancel(order: Order, why: str) -> bool:
        if order.verb not in CANCELLABLE or order.task is None:
            return False
        order.cancelled_by = order.cancelled_by or why
        return order.task.cancel()

    async def close(self) -> None:
        tasks = [order.task for order in self._orders.values() if order.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _unheard(task: asyncio.Task[Any]) -> None:
    """Nobody waits for the order any more. That it was refused or failed was told already."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, LlmuxError):
        log.error("%s failed", task.get_name(), exc_info=error)


def _fields(order: Order) -> dict[str, Any]:
    return {"model": order.models[0]} if len(order.models) == 1 else {}
