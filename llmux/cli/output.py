"""How values are printed: tables, JSON, times and sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmux.errors import LlmuxError, Refused


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2)


def print_json(value: Any) -> None:
    print(as_json(value))


def failure(error: LlmuxError) -> dict[str, Any]:
    """What --json has of an error."""
    code = error.reason.value if isinstance(error, Refused) else "failed"
    return {"error": {"code": code, "message": str(error)}}


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f}s"
    if seconds < 7200:
        return f"{seconds / 60:.0f}m"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f}h"
    return f"{seconds / 86400:.0f}d"


def sizes(done: int, total: int) -> str:
    return f"{size(done)} of {size(total)}" if total else size(done)


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    for line in aligned(rows):
        print(line)


def cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"
