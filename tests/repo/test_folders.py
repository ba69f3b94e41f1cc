"""The floor plan: folders of a readable size, each with its paragraph in ARCHITECTURE."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 16
# Recorded inputs, each with what it must give: a list, not a structure.
LISTS = {"tests/fixtures/config/bad"}


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a checkout")
    return [Path(line) for line in done.stdout.splitlines()]


def test_no_folder_has_more_files_than_can_be_taken_in() -> None:
    sizes = Counter(str(path.parent) for path in tracked())
    large = {folder: size for folder, size in sizes.items() if size > MOST_FILES}
    assert set(large) - LISTS == set(), large


def test_architecture_has_every_folder_of_the_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.partition("\n## Folders\n")[2].partition("\n## ")[0]
    named = {name.removeprefix("llmux/") for name in re.findall(r"\*\*`([^`]+)/`", section)}
    named = {"llmux" if name == "llmux" else f"llmux/{name}" for name in named}
    folders = {str(path.parent) for path in tracked() if path.parts[0] == "llmux"}
    assert named == folders


def test_the_top_level_is_the_customers() -> None:
    folders = {path.parts[0] for path in tracked() if len(path.parts) > 1}
    assert folders == {"llmux", "units", "packaging", "ansible", "tests", "scripts", ".ci"}
