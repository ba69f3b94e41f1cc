"""The supervisor's journal has each note on the configuration once, until it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmux.config.advice import WITHOUT_KEYS
from llmux.config.load import load_marked
from llmux.daemon.duties import Notes
from llmux.errors import Problem


def test_a_note_is_said_once_until_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llmux")
    notes, file = Notes(), tmp_path / "config.yaml"

    def said(text: str) -> list[str]:
        file.write_text(text)
        caplog.clear()
        notes.say(load_marked(file))
        return [record.getMessage() for record in caplog.records]

    plain = "models: {a: {model_path: m}}\n"
    assert said(plain) == [WITHOUT_KEYS]
    assert said(plain) == []
    old = "policy:\n  min_quantum_ms: 300\n" + plain
    (note,) = said(old)
    assert "policy.min_quantum_ms: this key has no effect" in note
    assert said(f"# one line down\n{old}") == []
    keys = tmp_path / "keys"
    keys.write_text("")
    keys.chmod(0o600)
    assert said(f"{plain}gateway: {{keys_file: {keys}}}\n") == []
    assert said(old) == [note, WITHOUT_KEYS], "what went and came back is said again"


def test_the_same_note_on_two_keys_is_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "config.yaml"
    model = "model_path: m, gpu_memory: 0.2, extra_args: [--hf-token, x]"
    file.write_text(f"models: {{a: {{{model}}}, b: {{{model}}}}}\n")
    marked = load_marked(file)
    assert len({note.message for note in marked.notes}) == 1
    Notes().say(marked)
    assert [path for path in "ab" if f"models.{path}." in caplog.text] == ["a", "b"]


def test_notes_differ_by_file_key_and_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="llmux")
    file = tmp_path / "config.yaml"
    file.write_text("models: {a: {model_path: m}}\n")
    marked = load_marked(file)
    one = Problem("x.yaml", 1, 1, "a", "it has no effect")
    others = [
        replace(one, file="other"), replace(one, path="other"), replace(one, message="other")
    ]  # fmt: skip
    notes = Notes()
    notes.say(replace(marked, notes=(one, *others)))
    assert caplog.messages == [str(note) for note in (one, *others)]
    caplog.clear()
    notes.say(replace(marked, notes=(replace(others[2], line=7, column=3), one)))
    assert caplog.messages == []
