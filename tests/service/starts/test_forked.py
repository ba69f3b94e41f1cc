"""A forked program finds what one that was started anew does."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import forked
import pytest

pytestmark = pytest.mark.long

LOOK = """
import json, os, random, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
json.dump({
    "fds": sorted(map(int, fds)), "environment": dict(os.environ), "arguments": sys.argv,
    "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")], "path": sys.path[0],
    "folder": os.getcwd(), "input": os.readlink("/proc/self/fd/0"), "main": __name__,
    "leads": os.getsid(0) == os.getpid(), "chance": random.random(),
}, sys.stderr)
sys.stderr.flush()
os.kill(os.getpid(), 9) if sys.argv[1:] == ["die"] else sys.exit(3)
"""


def look(*words: str, **more: Any) -> tuple[int, dict[str, Any]]:
    process = forked.start(
        ["-c", LOOK, *words], env={"PATH": "/bin", "A": "b"}, stderr=subprocess.PIPE, **more
    )
    assert process.stderr is not None
    with process.stderr as pipe:
        found: dict[str, Any] = json.load(pipe)
    return process.wait(45), found


def test_a_fork_finds_what_a_new_interpreter_does() -> None:
    with open(os.devnull, "rb") as passed:
        settings = {"pass_fds": [passed.fileno()], "start_new_session": True}
        status, fork = look("x", **settings)
        other, anew = look("x", own_interpreter=True, **settings)
        assert passed.fileno() in fork["fds"]
    assert fork.pop("chance") != anew.pop("chance")
    anew["environment"].pop("LC_CTYPE", None)  # Python's own, where no locale is set
    fork["environment"].pop("LC_CTYPE", None)
    assert fork == anew
    assert (status, other) == (3, 3)


def test_each_fork_has_its_own_chance_and_end() -> None:
    (first, one), (second, two) = look("die"), look()
    assert (first, second) == (-9, 3)
    assert one["chance"] != two["chance"]
    assert not one["leads"]
