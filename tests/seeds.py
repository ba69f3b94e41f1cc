"""The seed of whatever a test draws: its own variable, the run's, or a new one.

`scripts/test` gives its whole run one seed ($LLMUX_SEED), so that its answer is about the tree and
not about a draw; `scripts/test fast` and pytest alone draw, which is how new faults are found.
"""

from __future__ import annotations

import os
import secrets


def seed_of(variable: str) -> int:
    """What ``variable`` or $LLMUX_SEED says; printed, for the report of a failure."""
    said = os.environ.get(variable) or os.environ.get("LLMUX_SEED")
    seed = int(said) if said else secrets.randbelow(1 << 32)
    print(f"seed {seed} (${variable} repeats it)")
    return seed
