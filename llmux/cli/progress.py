"""Show progress on stderr: one rewritten line on a terminal, else a line per phase."""

from __future__ import annotations

import logging
import shutil
import sys
from types import TracebackType
from typing import Self, TextIO

from llmux.cli.output import sizes
from llmux.phases import counted, phase_text
from llmux.printable import printable

CLEAR = "\r\x1b[K"  # ECMA-48: erase to the end of the line


class Progress:
    """A context manager; leaving it puts the cursor on a new line."""

    def __init__(self, model: str, out: TextIO | None = None) -> None:
        self._model = model
        self._out = out or sys.stderr
        self._terminal = self._out.isatty()
        self._phase = ""
        self._dirty = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._dirty:
            self._write(CLEAR)

    def __call__(self, phase: str, seconds: float, done: int, total: int) -> None:
        line = f"{self._model}: {phase_text(phase)}"
        if self._terminal:
            line += f" {_amount(phase, done, total)}" if done else ""
            self._write(f"{CLEAR}{line}  {seconds:.0f} s")
            self._dirty = True
        elif phase != self._phase:
            self._write(f"{line} ({seconds:.1f} s)\n")
        self._phase = phase

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Looking:
    """A context manager; called with what is being done, it shows that on a terminal: one line,
    which is gone at the end, and before a line of the log. Elsewhere it says nothing."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._shown = self._out.isatty()
        found = [*logging.getLogger().handlers, logging.lastResort] if self._shown else []
        self._handlers = [handler for handler in found if handler is not None]

    def __enter__(self) -> Self:
        for handler in self._handlers:
            handler.addFilter(self._make_way)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._write("")
        for handler in self._handlers:
            handler.removeFilter(self._make_way)

    def _make_way(self, _: logging.LogRecord) -> bool:
        self._write("")
        return True

    def __call__(self, doing: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = f"{printable(doing)} …"
        self._write(line if len(line) <= width else f"{line[: max(width - 1, 0)]}…")

    def _write(self, line: str) -> None:
        if self._shown:
            self._out.write(f"{CLEAR}{line}")
            self._out.flush()


def _amount(phase: str, done: int, total: int) -> str:
    unit = counted(phase)
    return sizes(done, total) if unit == "bytes" else f"{done} of {total} {unit}"
