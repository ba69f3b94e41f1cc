"""Why an engine died, in words: from what it said last, and from what kept it from saying more."""

from __future__ import annotations

from typing import Final

from llmux.config.schema import ModelConfig
from llmux.ports import EngineOutput

CAUSE_LINES: Final = 200  # an error of one process is followed by tracebacks of the others
TAIL_LINES: Final = 12


def with_cause(output: EngineOutput, config: ModelConfig, description: str) -> str:
    """One line with the root cause; without one, the last lines of output."""
    if (shortage := output.shortage()) is not None:
        description = f"{description}, perhaps of its own output: {shortage}"
    tail = output.tail(config.name, CAUSE_LINES)
    cause = config.engine_type.root_cause(tail)
    if cause is not None:
        return f"{description}: {cause} (see `llmux logs {config.name}`)"
    if "SIGKILL" in description and "memory" not in description.lower():
        description += " (out of memory? see `journalctl -k`)"
    last = "\n".join(tail[-TAIL_LINES:])
    return description + (f"; its last lines:\n{last}" if last else "")
