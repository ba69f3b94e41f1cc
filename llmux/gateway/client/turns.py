"""When a client's connection is read: long bodies in turns, a few in each pass of the loop.

What is ready to be read is read before anything else happens, megabytes of each connection: with
500 clients that upload, a pass took ten seconds, and a short request needs several passes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

AT_ONCE: Final = 4  # a piece of 250 KB of each: some 10 ms in all
SLICE: Final = 8 * 1024  # what is parsed at once: of the worst kind some 5 ms …
SLICES_SECS: Final = 0.002  # … of a piece, and before others have their turn


class Turns:
    """``wait``: ``turn_came`` is called in the next pass at the earliest."""

    __slots__ = ("_loop", "_waiting", "clock")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        self._waiting: deque[Reading] = deque()

    def wait(self, reading: Reading) -> None:
        if not self._waiting:
            self._loop.call_soon(self._go_on)
        self._waiting.append(reading)

    def _go_on(self) -> None:
        for _ in range(min(AT_ONCE, len(self._waiting))):
            self._waiting.popleft().turn_came()
        if self._waiting:
            self._loop.call_soon(self._go_on)


class Reading:
    """Whether one connection is read: not before its turn, nor while it is ``held``. Nothing else
    pauses or resumes its transport.

    A piece takes a millisecond to parse; one of tiny parts, members or chunks takes a hundred. So
    it is parsed ``in_slices``: as many as there is time for, the others in later turns.
    """

    __slots__ = ("_in_line", "_parse", "_rest", "_transport", "_turns", "held")

    def __init__(self, turns: Turns, transport: Any) -> None:
        self._turns = turns
        self._transport = transport
        self._in_line = False
        self.held = False
        self._rest = memoryview(b"")  # of the piece being parsed
        self._parse: Callable[[Any], None] | None = None

    def in_slices(self, data: bytes, parse: Callable[[Any], None]) -> None:
        self._rest, self._parse = memoryview(data), parse
        self._parse_on()

    def _parse_on(self) -> None:
        until = self._turns.clock() + SLICES_SECS
        while self._parse is not None and not self._transport.is_closing():
            piece, self._rest = self._rest[:SLICE], self._rest[SLICE:]
            parse = self._parse
            if not self._rest:
                self._parse = None
            parse(piece)
            if self._parse is not None and self._turns.clock() >= until:
                self.wait_turn()
                return
        self._parse = None

    def wait_turn(self) -> None:
        """Read on when it is this connection's turn."""
        if self._in_line or self._transport.is_closing():
            return
        self._in_line = True
        self._transport.pause_reading()
        self._turns.wait(self)

    def turn_came(self) -> None:
        self._in_line = False
        if self._parse is not None:
            self._parse_on()
        self._go_on()

    def hold(self) -> None:
        self.held = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def release(self) -> None:
        self.held = False
        self._go_on()

    def _go_on(self) -> None:
        if not (self.held or self._in_line or self._transport.is_closing()):
            self._transport.resume_reading()
