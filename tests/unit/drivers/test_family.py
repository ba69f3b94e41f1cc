"""A process that left the cgroup of its unit is the unit's still: seen, and killed by its pidfd."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from llmux.drivers.processes.cgroup import process_state
from llmux.drivers.processes.family import Families
from llmux.drivers.processes.process import start_ticks
from llmux.ports import UnitHandle

# A root, its child in a session of its own, and that one's child; the line has their pids.
TREE = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    below = os.fork()
    if below:
        os.write(write, f"{os.getpid()} {below}\\n".encode())
    while True:
        signal.pause()
print(os.read(read, 99).decode(), end="", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def tree() -> Iterator[tuple[UnitHandle, int, int]]:
    """(unit, child, grandchild); the unit's cgroup is what a test says it is."""
    with subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE) as root:
        assert root.stdout is not None
        child, below = map(int, root.stdout.readline().split())
        handle = UnitHandle("m", "llmux-m.scope", root.pid, start_ticks(root.pid) or 0, "/m")
        yield handle, child, below
        for pid in (below, child, root.pid):
            if process_state(pid) not in "ZX":
                os.kill(pid, signal.SIGKILL)


def test_a_root_that_left_is_seen_and_named_once(
    tree: tuple[UnitHandle, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    handle, _, _ = tree
    families = Families()
    assert families.note(handle, [handle.pid]) == []
    with caplog.at_level(logging.WARNING):
        assert families.note(handle, []) == [handle.pid]
        assert families.note(handle, []) == [handle.pid]
    (record,) = caplog.records
    assert f"process {handle.pid} of llmux-m.scope left its cgroup for /" in record.getMessage()


def test_many_that_left_are_one_line_of_a_look(
    tree: tuple[UnitHandle, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    handle, child, below = tree
    families = Families()
    assert families.note(handle, [handle.pid, child, below]) == []
    for _ in range(2):
        assert families.note(handle, [handle.pid]) == sorted([child, below])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"process {min(child, below)} of llmux-m.scope left its")
    assert record.getMessage().endswith(", as did 1 more")
    assert families.note(handle, []) == sorted([handle.pid, child, below])
    said = caplog.records[1].getMessage()
    assert (len(caplog.records), "more" in said) == (2, False), "of what was not said before"


def test_what_is_below_it_left_as_well(tree: tuple[UnitHandle, int, int]) -> None:
    handle, child, below = tree
    families = Families()
    found = asyncio.run(families.find_outside(handle, [handle.pid]))
    outside = [pid for pid, _ in found]
    assert outside == sorted([child, below])
    # Remembered: their parent may die, and they have no place in the tree then.
    assert families.note(handle, []) == sorted([handle.pid, child, below])


def test_all_are_killed_though_they_ignore_sigterm(tree: tuple[UnitHandle, int, int]) -> None:
    handle, child, below = tree

    async def main() -> None:
        families = Families()
        end = time.monotonic() + 10
        assert await families.kill_outside(handle, list, end) == []

    asyncio.run(main())
    assert [process_state(pid) for pid in (handle.pid, child, below)].count("S") == 0
    assert all(process_state(pid) in "ZX" for pid in (handle.pid, child, below))


def test_members_of_the_cgroup_are_left_to_it(tree: tuple[UnitHandle, int, int]) -> None:
    handle, child, below = tree

    async def main() -> None:
        members = [handle.pid, child]
        left = await Families().kill_outside(handle, lambda: members, time.monotonic() + 10)
        assert left == []

    asyncio.run(main())
    assert process_state(below) in "ZX"
    assert process_state(child) not in "ZX"
    assert process_state(handle.pid) not in "ZX"


def test_another_process_by_the_same_pid_is_not_touched(tree: tuple[UnitHandle, int, int]) -> None:
    handle, _, _ = tree
    other = UnitHandle("m", handle.unit, handle.pid, handle.start_ticks + 1, "/m")
    assert Families().note(other, []) == []


def test_a_unit_that_is_forgotten_is_seen_anew(
    tree: tuple[UnitHandle, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    handle, child, _ = tree
    families = Families()
    families.forget(handle)  # never seen
    for _ in range(2):
        assert families.note(handle, [handle.pid, child]) == []
        assert families.note(handle, [handle.pid]) == [child]
        families.forget(handle)
        assert families.note(handle, [handle.pid]) == []
        families.forget(handle)
    left = [f"process {child} of" in record.getMessage() for record in caplog.records]
    assert left == [True, True], "said again of what is known again"


def test_where_nothing_left_nothing_is_killed(tree: tuple[UnitHandle, int, int]) -> None:
    handle, child, below = tree
    members = [handle.pid, child, below]
    families = Families()
    assert asyncio.run(families.kill_outside(handle, lambda: members, time.monotonic() + 10)) == []
    assert all(process_state(pid) not in "ZX" for pid in members)
