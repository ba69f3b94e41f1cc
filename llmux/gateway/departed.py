"""Clients that may be gone while nothing more is read of what they sent: the event loop tells only
of those that are read from."""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING

from llmux.gateway.tickets import Stage

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol

_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def look_after(front: FrontProtocol) -> None:
    """Once a second. A request must not go on waiting for nobody, and be the reason of a switch."""
    transport = front.transport
    if transport is None or transport.is_closing() or transport.is_reading():
        return
    if _has_left(transport):
        transport.abort()
    elif front.exchange is not None and front.exchange.stage is Stage.WAITING:
        # Its departure would be announced behind the bytes that lie unread.
        front.read_no_further()


def _has_left(transport: asyncio.Transport) -> bool:
    """The other side has closed or reset the connection, as far as its kernel could tell ours."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _GONE)
    return bool(poll.poll(0))
