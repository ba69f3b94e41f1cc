"""The state diagram in ARCHITECTURE.md is drawn from the transition table."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux.core.states import diagram

ARCHITECTURE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"
BEGIN, END = "<!-- states:begin -->", "<!-- states:end -->"
REMEDY = "python -c 'from llmux.core.states import diagram; print(diagram())'"


def test_the_diagram_in_the_architecture_is_the_transition_table() -> None:
    assert ARCHITECTURE.exists(), f"{ARCHITECTURE} is missing"
    text = ARCHITECTURE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    drawn, end, _ = rest.partition(END)
    assert begin and end, f"{ARCHITECTURE.name} has no {BEGIN} … {END}"
    line = before.count("\n") + 1
    expected = f"```mermaid\n{diagram()}\n```"
    if drawn.strip() != expected:
        pytest.fail(
            f"{ARCHITECTURE.name}:{line}: the diagram is not the transition table's; put this"
            f" between the marks (`{REMEDY}`):\n{expected}"
        )
