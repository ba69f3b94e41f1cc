"""A model's name as a part of units' names and as a directory."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.names import escape, unescape


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("qwen3-0.6b", "qwen3-0.6b"),
        ("Qwen/Qwen3-8B", "Qwen\\x2fQwen3-8B"),
        ("..", "\\x2e."),
        (".hidden", "\\x2ehidden"),
        ("a\\x2fb", "a\\x5cx2fb"),
    ],
)
def test_how_names_are_escaped(name: str, escaped: str) -> None:
    assert escape(name) == escaped


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_a_name_comes_back_and_is_one_directory_that_is_not_hidden(name: str) -> None:
    escaped = escape(name)
    assert unescape(escaped) == name
    assert escaped.isascii()
    assert os.path.basename(escaped) == escaped
    assert not escaped.startswith(".")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_directory_of_another_has_a_name_too(name: str) -> None:
    assert isinstance(unescape(name), str)
