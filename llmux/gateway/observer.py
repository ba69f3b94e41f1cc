"""Plain counters of one worker; /metrics reads them. Nothing here decides anything.

Labels come from the configuration only: an unknown model name is counted under no name at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from llmux.metrics import Histogram

UNKNOWN = ""


def _histograms() -> defaultdict[str, Histogram]:
    return defaultdict(Histogram)


@dataclass(slots=True)
class Observer:
    """``waited`` is called with (model, seconds) for every request that is admitted or given up.
    ``known``: the models there are; anything may be in it until it is set."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # (model, status)
    broken: Counter[str] = field(default_factory=Counter)  # answers that ended in an error midway
    abandoned: Counter[str] = field(default_factory=Counter)  # the client left before the end
    retried: Counter[str] = field(default_factory=Counter)  # waited again after an engine's death
    waits: defaultdict[str, Histogram] = field(default_factory=_histograms)
    first_tokens: defaultdict[str, Histogram] = field(default_factory=_histograms)
    durations: defaultdict[str, Histogram] = field(default_factory=_histograms)
    known: Container[str] | None = None
    chunks: int = 0
    link_reconnects: int = 0
    waited: Callable[[str, float], None] | None = None

    def __post_init__(self) -> None:
        if self.waited is None:
            self.waited = self._waited

    def answered(self, model: str, status: int) -> None:
        if self.known is not None and model not in self.known:
            model = UNKNOWN
        self.requests[model, status] += 1

    def _waited(self, model: str, seconds: float) -> None:
        if self.known is None or model in self.known:
            self.waits[model].observe(seconds)

    def first_byte(self, model: str, seconds: float) -> None:
        self.first_tokens[model].observe(seconds)

    def finished(self, model: str, seconds: float) -> None:
        self.durations[model].observe(seconds)
