"""Plain counters of one worker; /metrics reads them. Nothing here decides anything.

Labels come from the configuration only: an unknown model name is counted under no name at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

from llmux.metrics import Histogram

UNKNOWN = ""


@dataclass(slots=True)
class Times:
    """Of one model, in seconds. ``waits``: of every request that was admitted or given up."""

    waits: Histogram = field(default_factory=Histogram)
    first_tokens: Histogram = field(default_factory=Histogram)
    durations: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class Observer:
    """``known``: the models there are; anything may be in it until it is set."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # (model, status)
    broken: Counter[str] = field(default_factory=Counter)  # answers that ended in an error midway
    abandoned: Counter[str] = field(default_factory=Counter)  # the client left before the end
    retried: Counter[str] = field(default_factory=Counter)  # waited again after an engine's death
    times: dict[str, Times] = field(default_factory=dict)  # by model
    known: Container[str] | None = None

    def answered(self, model: str, status: int) -> None:
        if self.known is not None and model not in self.known:
            model = UNKNOWN
        self.requests[model, status] += 1

    def times_of(self, model: str) -> Times:
        """Looked up once a request; of a model that is not there they are counted nowhere."""
        times = self.times.get(model)
        if times is None:
            times = Times()
            if self.known is None or model in self.known:
                self.times[model] = times
        return times
