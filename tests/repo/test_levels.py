"""The levels of `scripts/test`: what one leaves out another runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# Marks of a whole module, or of each case of its only test, of those that `fast` leaves out.
LEFT_OUT = re.compile(
    r"(^pytestmark = \[?|marks=\[)\s*pytest\.mark\.(long|system|vm|engine|gpu|fleet)\b",
    re.MULTILINE,
)


def test_what_fast_does_not_even_collect_is_left_out_anyway() -> None:
    script = (ROOT / "scripts" / "test").read_text()
    fast = script[script.index("\nfast)\n    say") : script.index("\nservice)\n    say")]
    folders, patterns = re.findall(r"--ignore=(\S+)", fast), re.findall(r"glob='(\S+)'", fast)
    assert folders
    assert patterns
    modules = [path for folder in folders for path in (ROOT / folder).rglob("test_*.py")]
    modules += [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert modules
    for path in modules:
        assert LEFT_OUT.search(path.read_text()), path
