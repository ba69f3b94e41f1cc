"""Who is connected to the control socket: what each may say, and how many there may be.

A connection holds up to 2 MiB of what its peer says. Whoever owns the gateway's process, or is a
member of the group llmux-admin, must not fill the supervisor's memory or take the place of others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from llmux.peers import user_name
from llmux.protocol import Ask

log = logging.getLogger("llmux")

# A gateway has 256 workers at most, twice as many while the next one takes over, and orders over
# HTTP use those connections; an operator's `load --all` has one for each model.
MAX_OF_USER: Final = 600
MAX_OF_OTHERS: Final = 1500  # of all users but root and ourselves

WINDOW_SECS: Final = 10.0
COMPLAINTS: Final = 20  # in a window


class Connections:
    """The open ones. Root's and our own are not bounded: who has them needs no such way."""

    def __init__(self, of_user: int = MAX_OF_USER, of_others: int = MAX_OF_OTHERS) -> None:
        self._of_user = of_user
        self._of_others = of_others
        self._open: Counter[int] = Counter()  # by user
        self._told: set[int] = set()  # users whose refusal is in the journal

    def admit(self, uid: int) -> str | None:
        """Count one more; or why not. Each time a user is refused is said once, until half of its
        connections have ended."""
        if uid in (0, os.getuid()):
            return None
        why = None
        if self._open[uid] >= self._of_user:
            why = f"user {user_name(uid)} has {self._open[uid]} control connections"
        elif self._open.total() >= self._of_others:
            why = f"there are {self._open.total()} control connections"
        if why is None:
            self._open[uid] += 1
            return None
        if uid not in self._told:
            self._told.add(uid)
            log.warning("user %s is refused a control connection: %s", user_name(uid), why)
        return f"cannot accept the connection: {why}"

    def left(self, uid: int) -> None:
        if uid not in self._open:
            return
        self._open[uid] -= 1
        if self._open[uid] <= self._of_user / 2:
            self._told.discard(uid)
        if not self._open[uid]:
            del self._open[uid]


class Complaints:
    """What peers do wrong, in the journal: so many lines in a window, then how many were left out.
    One that comes again and again would push everything else out of it."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._began = -WINDOW_SECS
        self._said = 0
        self._left_out = 0

    def warn(self, text: str, *args: object) -> None:
        now = self._clock()
        if now - self._began >= WINDOW_SECS:
            if self._left_out:
                log.warning("%d more complaints of control connections", self._left_out)
            self._began, self._said, self._left_out = now, 0, 0
        if self._said < COMPLAINTS:
            self._said += 1
            log.warning(text, *args)
        else:
            self._left_out += 1


@dataclass(frozen=True, slots=True)
class Peer:
    """``caller``: who gives its orders; None for a gateway's worker, which says so itself.
    ``asking``: the asks that are not answered yet."""

    worker: str | None
    caller: str | None
    verbs: frozenset[str] | None
    writer: asyncio.StreamWriter
    asking: set[asyncio.Task[None]]

    def signed(self, ask: Ask) -> Ask:
        """The ask with who gives it; a command line cannot give another name than its own."""
        by = ask.args.get("by") if self.caller is None else self.caller
        return replace(ask, args=ask.args | {"by": by if isinstance(by, str) else "the API"})


def socket_of(writer: asyncio.StreamWriter) -> socket.socket:
    """Raises ConnectionError for a connection that has ended: uvloop gives no socket then."""
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is None:
        raise ConnectionResetError("the peer is gone")
    return sock
