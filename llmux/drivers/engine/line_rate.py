"""How many of an engine's lines the journal gets.

An engine that writes thousands of lines a second would push everything else out of the journal, and
fill its disk. The engine's files have all of them; the journal gets so many in a window, then only
errors, then none, and is told how many were left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

WINDOW_SECS: Final = 10.0
LINES: Final = 2_000  # in a window: a start of vLLM writes some hundred
ERRORS: Final = 500  # besides them: what went wrong comes last
AGAIN_SECS: Final = 1.0  # until a journal that did not take a report is asked again
ERROR_PRIORITY: Final = 3


class LineRate:
    """The lines of one engine. ``left_out``: since it was last reported."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = -WINDOW_SECS
        self._passed = 0
        self._errors = 0
        self.left_out = 0

    def admits(self, priority: int) -> bool:
        now = self._clock()
        if now - self._began >= WINDOW_SECS:
            self._began, self._passed, self._errors = now, 0, 0
        if self._passed < LINES:
            self._passed += 1
            return True
        if priority <= ERROR_PRIORITY and self._errors < ERRORS:
            self._errors += 1
            return True
        self.left_out += 1
        return False
