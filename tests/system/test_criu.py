"""The CRIU driver in a guest, with the stand-in engine: criu_scenarios.py."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import criu_scenarios
from _lab.guest import Guest

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest with its own PID 1"),
    pytest.mark.timeout(600),  # the first run builds the image
]

PROGRAM = "/srv/llmux/tests/system/criu_scenarios.py"


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest.up() as started:
        started.run(["criu", "check"])
        yield started


@pytest.mark.parametrize(
    "scenario", [name for name in criu_scenarios.scenarios() if not name.startswith("child_")]
)
def test_criu(guest: Guest, scenario: str) -> None:
    done = guest.run(["/usr/bin/python3", PROGRAM, scenario], check=False, timeout=180)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
