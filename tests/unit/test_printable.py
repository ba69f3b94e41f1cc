"""What a terminal would obey is in nothing that llmux prints of an engine's words."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.printable import clean, printable, printable_tree

HARMLESS = "Größe 日本語 – 👍 [100%] a\tb"


@given(st.text(alphabet=st.characters(codec=None, categories=None)))
def test_no_control_character_is_left(text: str) -> None:
    for shown in (clean(text), printable(text).replace("\n", "")):
        assert not [char for char in shown if unicodedata.category(char) == "Cc" and char != "\t"]
        assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
        shown.encode()  # no lone surrogate either


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\x1b]0;PWNED\x07b", "ab"),  # the title of the terminal
        ("a\x1b]52;c;ZXZpbA==\x1b\\b", "ab"),  # its clipboard
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("a\x9b31mred\x9b0m", "ared"),
        ("a\x9d0;PWNED\x9cb", "ab"),
        ("a\x1bP1$r0m\x1b\\b", "ab"),
        ("a\x1bcb", "acb"),
        ("a\x85b\x84c", "abc"),
        ("price \u202e99.1$", "price 99.1$"),
        (HARMLESS, HARMLESS),
    ],
)
def test_sequences(said: str, shown: str) -> None:
    assert printable(said) == clean(said) == shown


def test_line_breaks_stay_and_only_the_last_state_of_a_bar_is_shown() -> None:
    assert printable("one\n\x1b[1mtwo\r\n") == "one\ntwo\n"
    assert clean("1%\r50%\r100%\r") == "100%"


def test_all_strings_of_an_answer() -> None:
    evil = "a\x1b]0;x\x07b"
    answer = {"models": {evil: {"error": evil, "n": 1}}, "lines": [evil, None, 2.5, True]}
    cleaned = printable_tree(answer)
    assert cleaned == {"models": {"ab": {"error": "ab", "n": 1}}, "lines": ["ab", None, 2.5, True]}
    assert "\\u001b" not in json.dumps(cleaned)
