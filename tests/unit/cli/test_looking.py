"""What a command that takes long is doing: one line on a terminal, nothing elsewhere."""

from __future__ import annotations

import io
import logging
import re

import pytest

from llmux.cli.progress import CLEAR, Looking


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_is_done_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    with Looking(out) as looking:
        looking("looking at GPUs")
        looking("importing torch and vllm")
        looking("a \x1b[2J name")
    assert out.getvalue().split(CLEAR) == [
        "",
        "looking at GPUs …",
        "importing torch an…",
        "a  name …",
        "",
    ]


def test_elsewhere_nothing_is_said() -> None:
    out = io.StringIO()
    with Looking(out) as looking:
        looking("looking at GPUs")
    assert out.getvalue() == ""


def test_a_line_of_the_log_stands_alone() -> None:
    out = Terminal()
    handler = logging.StreamHandler(out)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with Looking(out) as looking:
            looking("looking at GPUs")
            logging.getLogger("llmux.looking").warning("cannot read x")
        logging.getLogger("llmux.looking").warning("afterwards")
    finally:
        root.removeHandler(handler)
    said = out.getvalue().replace(CLEAR, "|")  # a filter clears it for each handler that there is
    assert re.sub(r"\|+", "|", said) == "|looking at GPUs …|cannot read x\n|afterwards\n"
