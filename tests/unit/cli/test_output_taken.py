"""What the command line does with a disk that takes no more, and with files of other editors."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmux.cli.main import main
from llmux.config.keyfile import hash_key, load_keys


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """Files end at so many bytes, as on a full disk: a write takes what there is room for."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    for name in ("a", "b"):
        assert main(["key", "new", name, "--file", str(made)]) == 0
    return made


@pytest.mark.parametrize("words", [["new", "c"], ["revoke", "b"]])
@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_leaves_the_keys_as_they_were(
    words: list[str], room: int, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file.read_bytes()
    capsys.readouterr()
    with files_of((len(before) if words[0] == "new" else 0) + room):
        assert main(["key", *words, "--file", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == "", "no key that is not in force"
    assert said.err.startswith(f"llmux: cannot write {file}: ")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("form", ["lines", "yaml"])
def test_keys_of_an_editor_on_windows(form: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hash_key("x").hex()
    lines = [f'{{"name": "{name}", "sha256": "{digest}"}}' for name in ("a", "b")]
    text = "".join(f"{'- ' if form == 'yaml' else ''}{line}\r\n" for line in lines)
    file.write_bytes(text.encode("utf-8-sig"))
    assert main(["key", "new", "c", "--file", str(file)]) == 0
    assert [key.name for key in load_keys(str(file))] == ["a", "b", "c"]
    assert main(["key", "revoke", "a", "--file", str(file)]) == 0
    assert [key.name for key in load_keys(str(file))] == ["b", "c"]


def test_an_output_that_takes_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["version"]) == 1
        assert full.closed, "nothing is written, and fails, at the end"
    assert capsys.readouterr().err == ("llmux: cannot write the output: No space left on device\n")
