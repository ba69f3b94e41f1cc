"""The levels of `scripts/test`: what one leaves out another runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_what_fast_does_not_even_collect_is_long() -> None:
    ignored = re.findall(r"--ignore=(\S+)", (ROOT / "scripts" / "test").read_text())
    modules = [path for folder in ignored for path in (ROOT / folder).rglob("test_*.py")]
    assert modules
    for path in modules:
        assert "\npytestmark = pytest.mark.long\n" in path.read_text(), path
