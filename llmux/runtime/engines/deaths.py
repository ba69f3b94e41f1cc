"""Why an engine died, in words: from what it said last, and from what kept it from saying more."""

from __future__ import annotations

from typing import Final

from llmux.config.schema import ModelConfig
from llmux.core.plans import PlanKind
from llmux.errors import EngineUnhealthy
from llmux.ports import EngineOutput

CAUSE_LINES: Final = 200  # an error of one process is followed by tracebacks of the others
TAIL_LINES: Final = 12


def behind_answer(
    output: EngineOutput, config: ModelConfig, kind: PlanKind, error: Exception
) -> str:
    """What an engine wrote of the fault that it answered an order of its start with: it says "see
    the stack trace above" and goes on for seconds. Empty where that is not so, or not known."""
    if kind is not PlanKind.START or not isinstance(error, EngineUnhealthy):
        return ""
    if error.fields.get("status", 0) < 500:
        return ""
    cause = config.engine_type.root_cause(output.tail(config.name, CAUSE_LINES))
    return "" if cause is None else f": {cause} (see `llmux logs {config.name}`)"


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
    if description == "exit status 0":  # nothing asked it to end
        description += " (an engine's program must stay in the foreground: see vllm_command)"
    last = "\n".join(tail[-TAIL_LINES:])
    return description + (f"; its last lines:\n{last}" if last else "")
