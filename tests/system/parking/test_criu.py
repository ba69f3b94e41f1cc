"""The CRIU driver in a guest, with the stand-in engine: criu_scenarios.py, criu_faults.py,
criu_swaps.py."""

from __future__ import annotations

import ast
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "scripts"))

from _lab.guest import Guest  # noqa: E402 (the path first)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest with its own PID 1"),
    pytest.mark.timeout(600),  # the first run builds the image
]

PROGRAM = "/srv/llmux/tests/system/parking/criu_scenarios.py"


def scenarios() -> list[str]:
    """Read, not imported: the programs need the guest's packages."""
    return [
        node.name
        for file in ("criu_scenarios.py", "criu_faults.py", "criu_swaps.py")
        for node in ast.parse((HERE / file).read_text()).body
        if isinstance(node, ast.AsyncFunctionDef)
        and [argument.arg for argument in node.args.args] == ["lab"]
        and not node.name.startswith("child_")
    ]


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest.up() as started:
        started.run(["criu", "check"])
        yield started


@pytest.mark.parametrize("scenario", scenarios())
def test_criu(guest: Guest, scenario: str) -> None:
    done = guest.run(["/usr/bin/python3", PROGRAM, scenario], check=False, timeout=180)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
