"""Traces: which request for which model arrives when, and how long the engine works on it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass

from llmux.errors import LlmuxError

COLUMNS = ("arrival_s", "model", "service_s")


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """Times in seconds. ``deadline``: how long the client waits for its model; None = for ever."""

    at: float
    model: str
    service: float
    deadline: float | None = None
    key: str = ""


def read_trace(lines: Iterable[str], name: str = "trace") -> list[Arrival]:
    """Rows of CSV under a heading with ``arrival_s,model,service_s[,deadline_s][,key]``."""
    rows = csv.DictReader(lines)
    missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise LlmuxError(
            f"cannot read {name}: no column {missing[0]}",
            hint="the first line must be arrival_s,model,service_s[,deadline_s][,key]",
        )
    found: list[Arrival] = []
    for number, row in enumerate(rows, start=2):
        try:
            deadline = row.get("deadline_s")
            arrival = Arrival(
                float(row["arrival_s"]),
                row["model"],
                float(row["service_s"]),
                float(deadline) if deadline else None,
                row.get("key") or "",
            )
        except (TypeError, ValueError) as error:
            raise LlmuxError(f"cannot read {name}, line {number}: {error}") from error
        if not (0 <= arrival.at < float("inf") and 0 <= arrival.service < float("inf")):
            raise LlmuxError(f"cannot read {name}, line {number}: times must be 0 or more")
        found.append(arrival)
    return sorted(found)
