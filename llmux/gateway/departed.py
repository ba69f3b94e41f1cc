"""Whether a client is gone whose bytes are not being read: the event loop tells only of those that
are."""

from __future__ import annotations

import asyncio
import select

_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def has_left(transport: asyncio.Transport) -> bool:
    """The other side has closed or reset a connection on which reading is paused."""
    if transport.is_closing() or transport.is_reading():
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _GONE)
    return bool(poll.poll(0))
