"""scripts/pins: which vendored wheels are not the newest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from _docs.pins import PINS, PinError, compare, pins  # noqa: E402  # found by the line above

HASH = "--hash=sha256:" + "0" * 64


def test_every_line_of_the_pins_is_read() -> None:
    text = (ROOT / PINS).read_text()
    assert set(pins(text)) == {"sanic", "sanic-routing", "html5tagger", "tracerite"}


def test_a_line_that_is_no_pin_is_named() -> None:
    with pytest.raises(PinError, match=r"requirements-vendored.txt:2: .*'sanic>=1'"):
        pins("# a comment\nsanic>=1\n")


def test_the_table_and_the_exit_status() -> None:
    def ask(name: str) -> str:
        if name == "gone":
            raise PinError("cannot look up gone: no such project")
        return "2.0"

    old, new = pins(f"one==1.9 {HASH}\n"), pins(f"two==2.0 {HASH}\n")
    assert compare(new, ask) == (["two  2.0  is the newest"], 0)
    lines, status = compare(new | old, ask)
    assert status == 1 and lines[1] == "one  1.9  the newest is 2.0: read its changes"
    lines, status = compare(old | {"gone": "1"}, ask)
    assert status == 2 and "no such project" in lines[1]
