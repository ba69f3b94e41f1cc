"""Traces: which request for which model arrives when, and how long the engine works on it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
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
    rows = csv.reader(lines, skipinitialspace=True)
    heading = [column.strip() for column in next(rows, [])]
    missing = [column for column in COLUMNS if column not in heading]
    if missing:
        raise LlmuxError(
            f"cannot read {name}: no column {missing[0]}",
            hint="the first line must be arrival_s,model,service_s[,deadline_s][,key]",
        )
    found: list[Arrival] = []
    for values in rows:
        if not values:
            continue
        try:
            found.append(_arrival(heading, values))
        except ValueError as error:
            raise LlmuxError(f"cannot read {name}, line {rows.line_num}: {error}") from error
    if not found:
        raise LlmuxError(f"cannot read {name}: it has no requests")
    return sorted(found)


def _arrival(heading: Sequence[str], values: Sequence[str]) -> Arrival:
    if len(values) > len(heading):
        raise ValueError(f"{len(values)} values, but the heading has {len(heading)}")
    row = dict(zip(heading, values, strict=False))
    model = row.get("model", "").strip()
    if not model:
        raise ValueError("model is empty")
    at, service = _seconds(row, "arrival_s"), _seconds(row, "service_s")
    deadline = None
    if row.get("deadline_s", "").strip():
        deadline = _seconds(row, "deadline_s")
        if not deadline:
            raise ValueError("deadline_s must be above 0, or empty for none")
    return Arrival(at, model, service, deadline, row.get("key", ""))


def _seconds(row: Mapping[str, str], column: str) -> float:
    text = row.get(column, "").strip()
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f'{column} must be a number of seconds, 0 or more, not "{text}"')
    return seconds
