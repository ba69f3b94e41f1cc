"""Plain counters of one worker; /metrics reads them. Nothing here decides anything.

Labels come from the configuration only: an unknown model name is counted under no name at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

UNKNOWN = ""


@dataclass(slots=True)
class Observer:
    """``waited`` is called with (model, seconds) for every request that is admitted or given up."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # (model, status)
    broken: Counter[str] = field(default_factory=Counter)  # answers that ended in an error midway
    abandoned: Counter[str] = field(default_factory=Counter)  # the client left before the end
    retried: Counter[str] = field(default_factory=Counter)  # waited again after an engine's death
    chunks: int = 0
    link_reconnects: int = 0
    waited: Callable[[str, float], None] | None = None

    def answered(self, model: str, status: int) -> None:
        self.requests[model, status] += 1
