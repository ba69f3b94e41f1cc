"""The proof's table for people and its JSON document for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from _gpu_proof.matrix import Row

HEADER = (
    "engine",
    "weights + process",
    "park s",
    "wake s",
    "GPU MiB before",
    "parked",
    "woken",
    "answers equal",
    "image bytes",
    "outcome",
)


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | int | None) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    return (
        row.engine,
        f"{row.weights} + {row.process}",
        number(row.park_s),
        number(row.wake_s),
        number(row.before_mib),
        number(row.parked_mib),
        number(row.woken_mib),
        "-" if row.equal is None else "yes" if row.equal else "NO",
        number(row.image_bytes),
        row.outcome,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, so that it can be pasted into README as it is."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(HEADER), rule, *(line(cells) for cells in lines[1:])])


def remarks(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """Where this was measured, and each row that was not, with the reason."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += [
        f"{row.outcome}: {row.engine}, {row.weights} + {row.process}: {row.why}"
        for row in rows
        if row.outcome != "ok"
    ]
    return "\n".join(lines)


def document(rows: Sequence[Row], facts: Mapping[str, str]) -> dict[str, Any]:
    return {"facts": dict(facts), "rows": [row.as_json() for row in rows]}


def exit_status(rows: Sequence[Row]) -> int:
    """0: all that was measured is right; 1: something failed; 3: nothing was measured."""
    if any(row.outcome == "failed" for row in rows):
        return 1
    return 0 if any(row.outcome == "ok" for row in rows) else 3
