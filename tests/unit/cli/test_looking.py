"""What a command that takes long is doing: one line on a terminal, nothing elsewhere."""

from __future__ import annotations

import io

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
