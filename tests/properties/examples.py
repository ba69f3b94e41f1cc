"""How many examples a property is tried with: the usual number, or $LLMUX_CORE_EXAMPLES."""

from __future__ import annotations

import os


def examples(usual: int) -> int:
    return int(os.environ.get("LLMUX_CORE_EXAMPLES", usual))
