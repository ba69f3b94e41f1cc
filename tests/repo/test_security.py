"""SECURITY.md names tests; each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_each_test_that_holds_an_arrow_exists() -> None:
    named = set(re.findall(r"`(test_[a-z_]+\.py)`", (ROOT / "SECURITY.md").read_text()))
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 10
    assert named - there == set()
