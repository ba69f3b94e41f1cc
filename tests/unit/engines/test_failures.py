"""The one line that says why an engine died, from texts as vLLM writes them (rewritten)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.engines.failures import LONGEST, root_cause
from tests.failure_texts import FAILURES, FRAMES, in_the_core


@pytest.mark.parametrize("name", FAILURES)
def test_one_line_names_the_cause(name: str) -> None:
    lines, expected = FAILURES[name]
    cause = root_cause(lines)
    assert cause is not None
    assert expected in cause
    assert "See root cause above" not in cause


def test_a_traceback_that_was_only_a_warning_is_no_cause() -> None:
    handled = [f"WARNING 11-28 10:11:12 [x.py:1] {line}" for line in (*FRAMES, "OSError: no cache")]
    assert root_cause(handled) is None
    cause = root_cause([*handled, *in_the_core("ValueError: it")])
    assert cause == "ValueError: it"


def test_pydantic_s_detail_is_told_without_its_type() -> None:
    said = [
        *FRAMES,
        "ValidationError: 1 validation error for X",
        "  Value error, it [type=a] b [type=c]",
    ]
    assert root_cause(said) == "ValidationError: 1 validation error for X: it"


@pytest.mark.parametrize("lines", [[], ["INFO 11-28 10:11:12 [x.py:1] all is well"], ["", "  "]])
def test_nothing_is_made_up(lines: list[str]) -> None:
    assert root_cause(lines) is None


@given(st.lists(st.text(max_size=400), max_size=20))
def test_any_output_gives_one_short_line_or_none(lines: list[str]) -> None:
    cause = root_cause(lines)
    assert cause is None or (len(cause) <= LONGEST and "\n" not in cause)
