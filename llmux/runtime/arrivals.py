"""One line a minute about each model in use: when its requests came and how long an answer takes.

``llmux sim --from-journal`` makes a trace of these lines. Counts only; nothing of a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from llmux.core.demand.workers import Worker, WorkerDemand
from llmux.core.effects import SwitchFinished
from llmux.core.records import State

log = logging.getLogger("llmux")

EVERY_SECS = 60.0
MOST = 2000  # arrivals in one line, some 12 kB; a line is written early when there are as many
NONE = WorkerDemand()


class ArrivalLog:
    """A listener of the loop."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._arrivals: dict[str, list[float]] = {}

    def published(self, old: State, new: State) -> None:
        now = self._clock()
        if old.workers is not new.workers:
            for name, worker in new.workers.items():
                self._note(old.workers.get(name, Worker()), worker, now)
        for model, times in list(self._arrivals.items()):
            if now - times[0] >= EVERY_SECS or len(times) >= MOST:
                del self._arrivals[model]
                usage = new.usage.get(model)
                self._write(model, times, usage.service if usage is not None else 1.0, now)

    def switched(self, switch: SwitchFinished) -> None:
        pass

    def _note(self, old: Worker, new: Worker, now: float) -> None:
        if old.demands is new.demands:
            return
        for model, after in new.demands.items():
            before = old.demands.get(model, NONE)
            if before is after:
                continue
            ended = max(0, after.completed - before.completed)
            more = after.waiting + after.in_flight - before.waiting - before.in_flight
            if (arrived := more + ended) > 0:
                # A worker's counter may jump by any number; a line shows no more than MOST.
                self._arrivals.setdefault(model, []).extend([now] * min(arrived, MOST))

    @staticmethod
    def _write(model: str, times: list[float], service: float, now: float) -> None:
        log.info(
            "%s: %d requests in the last %.0f s, %.3g s for each answer",
            model,
            len(times),
            now - times[0],
            service,
            extra={
                "model": model,
                "duration_ms": round(service * 1000, 1),
                "arrivals": " ".join(f"{now - time:.2f}" for time in times),
            },
        )
