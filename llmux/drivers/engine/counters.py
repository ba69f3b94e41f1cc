"""What an engine's own /metrics say of its work, for signs of life."""

from __future__ import annotations

import math

from llmux.engines.engine_type import EngineType


def work_counters(body: bytes, engine: EngineType) -> tuple[int | None, float | None]:
    """(requests running or waiting, sum of what counts work) of a /metrics; None without."""
    running: float | None = None
    progress: float | None = None
    for line in body.decode(errors="replace").splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        try:
            if name in engine.load_series:
                running = (running or 0.0) + float(line.rpartition(" ")[2])
            elif name in engine.work_series:
                progress = (progress or 0.0) + float(line.rpartition(" ")[2])
        except ValueError:
            continue
    if running is None or progress is None or not math.isfinite(running):
        return None, None
    return int(running), progress
