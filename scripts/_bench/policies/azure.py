"""The public Azure LLM inference traces as a workload: each file is the traffic of one model.

A file has a line for each request, ``TIMESTAMP,ContextTokens,GeneratedTokens`` (AzurePublicDataset,
2023 and 2024). It does not say how long an answer took: that follows from its tokens, at the speeds
of a model of 8 billion parameters on a large GPU.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from _bench.policies.workloads import Workload, name_of
from llmux.sim.trace import Arrival

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
PREFILL = 8000.0  # tokens a second
DECODE = 40.0
WINDOW_SECS = 1200.0  # of one trace; the next one begins where it ends


class AzureError(Exception):
    """A file is not such a trace; the text names the line and what is wrong."""


def azure(paths: list[Path]) -> Workload:
    """``trace(n)`` is the n-th window of all files together, which begin at the same moment. Raises
    AzureError."""
    files = [list(_read(path)) for path in paths]
    first = min(at for rows in files for at, _ in rows)
    whole = sorted(
        Arrival(at - first, name_of(model), service)
        for model, rows in enumerate(files)
        for at, service in rows
    )
    return _Windows("Azure", len(paths), lambda _: iter(whole))


class _Windows(Workload):
    def trace(self, seed: int = 0) -> list[Arrival]:
        begins = seed * WINDOW_SECS
        whole = Workload.trace(self)
        found = [
            Arrival(one.at - begins, one.model, one.service)
            for one in whole
            if begins <= one.at < begins + WINDOW_SECS
        ]
        if not found:
            last = whole[-1].at
            raise AzureError(
                f"no window {seed + 1}: the files have {last:.0f} s; next step: --seeds"
                f" {int(last // WINDOW_SECS) + 1}"
            )
        return found


def _read(path: Path) -> Iterator[tuple[float, float]]:
    """(seconds since the epoch, seconds of the answer)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [one for one in COLUMNS if one not in (rows.fieldnames or ())]
            if missing:
                raise AzureError(f"{path}: no column {missing[0]}; it needs {','.join(COLUMNS)}")
            empty = True
            for row in rows:
                empty = False
                try:
                    yield _arrival(row)
                except (TypeError, ValueError) as error:
                    raise AzureError(f"{path}:{rows.line_num}: {error}") from error
            if empty:
                raise AzureError(f"{path}: no request in it")
    except (OSError, UnicodeError) as error:
        raise AzureError(f"{path}: cannot be read: {error}") from error


def _arrival(row: dict[str, str]) -> tuple[float, float]:
    at = datetime.fromisoformat(row["TIMESTAMP"])
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    context, generated = float(row["ContextTokens"]), float(row["GeneratedTokens"])
    if not (0 <= context < 1e9 and 0 <= generated < 1e9):
        raise ValueError(f"{context:g} and {generated:g} are no numbers of tokens")
    return at.timestamp(), context / PREFILL + generated / DECODE
