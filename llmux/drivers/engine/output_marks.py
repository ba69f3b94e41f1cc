"""How far an engine's output was passed on: a line beside each file, and what is read by it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from llmux.printable import clean
from llmux.trusted import open_own

BACKLOG: Final = 64 * 1024  # bytes read of a file without a known position


def write_mark(offset: int, begin: int, owner: str | None, before: int) -> str:
    return f"{offset:020d} {begin:020d} {owner or '-'} {before}".ljust(110) + "\n"


def read_mark(data: bytes, size: int) -> tuple[int, int, str, int]:
    """Return (offset, where this engine's output began, its owner, where that of the engine before
    began); the end without a mark."""
    fields = data.split()
    try:
        offset, begin = int(fields[0]), int(fields[1])
        owner = fields[2].decode()
        before = int(fields[3]) if len(fields) > 3 else begin
    except (ValueError, IndexError):
        return size, size, "-", size
    if min(offset, begin, before) < 0:
        return size, size, "-", size
    return (offset if offset <= size else 0), begin, owner, before


def read_part(
    opened: int, name: str, part: Callable[[int, int, int], tuple[int, int]]
) -> list[str]:
    """Lines of a file in a directory of ours, at most ``BACKLOG`` bytes. A file that was cut since
    has no former part."""
    fd = open_own(opened, name, os.O_RDONLY)
    try:
        mark = open_own(opened, f"{name}.offset", os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            _, begin, _, before = read_mark(os.pread(mark, 256, 0), size)
        finally:
            os.close(mark)
        start, end = part(begin, before, size)
        start = max(0, start, min(end, size) - BACKLOG)
        said = os.pread(fd, max(0, min(end, size) - start), start).decode(errors="replace")
    finally:
        os.close(fd)
    return [text for line in said.split("\n") if (text := clean(line))]
