"""Detect disconnects while reading is paused: EOF is reported only for sockets being read."""

from __future__ import annotations

import asyncio
import select

from llmux.gateway.admission.queue import Stage
from llmux.gateway.client.connection import ClientConnection

WAITED_SECS = 2.0  # longer than the retry after an engine's failure takes
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def check_half_closed(client: ClientConnection, now: float) -> None:
    """Called once a second. A request of a disconnected client must not go on waiting and cause a
    switch."""
    transport, exchange = client.transport, client.exchange
    if transport is None or transport.is_closing() or transport.is_reading():
        return
    if _disconnected(transport):
        transport.abort()
    elif (
        exchange is not None
        and exchange.stage is Stage.WAITING
        and now - exchange.arrived > WAITED_SECS
    ):  # EOF would be reported only after the bytes that are not read
        client.stop_reading()


def _disconnected(transport: asyncio.Transport) -> bool:
    """Whether the peer has closed or reset the connection, as far as our kernel knows."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _GONE)
    return bool(poll.poll(0))
