"""Clients that may be gone while nothing more is read of what they sent: the event loop tells only
of those that are read from."""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING

from llmux.gateway.tickets import Stage

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol

WAITED_SECS = 2.0  # an engine that is tried again makes nobody wait for longer
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def look_after(front: FrontProtocol, now: float) -> None:
    """Once a second. A request must not go on waiting for nobody, and be the reason of a switch."""
    transport, exchange = front.transport, front.exchange
    if transport is None or transport.is_closing() or transport.is_reading():
        return
    if _has_left(transport):
        transport.abort()
    elif (
        exchange is not None
        and exchange.stage is Stage.WAITING
        and now - exchange.arrived > WAITED_SECS
    ):  # its departure would be announced behind the bytes that lie unread
        front.read_no_further()


def _has_left(transport: asyncio.Transport) -> bool:
    """The other side has closed or reset the connection, as far as its kernel could tell ours."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _GONE)
    return bool(poll.poll(0))
