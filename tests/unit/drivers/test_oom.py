"""An engine that was killed for memory: by its limit, by the host, and when its cgroup is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmux.drivers.processes.oom import Oom

SLICE, UNIT = "llmux.slice", "llmux-a.scope"
CGROUP = f"/{SLICE}/{UNIT}"


def write(directory: Path, killed: int, at_limit: int, limit: str = "max") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    events = f"low 0\nhigh 0\nmax 9\noom {at_limit}\noom_kill {killed}\noom_group_kill 0\n"
    (directory / "memory.events").write_text(events)
    (directory / "memory.max").write_text(f"{limit}\n")


@pytest.fixture
def oom(tmp_path: Path) -> Oom:
    write(tmp_path / SLICE, 3, 3)  # of engines that were
    write(tmp_path / SLICE / UNIT, 0, 0, str(700 << 20))
    made = Oom(str(tmp_path), SLICE)
    made.watch(CGROUP)
    return made


def test_an_end_of_another_kind_is_none_of_memory(oom: Oom) -> None:
    assert oom.cause(CGROUP, UNIT) is None


def test_the_limit_is_named(oom: Oom, tmp_path: Path) -> None:
    write(tmp_path / SLICE / UNIT, 1, 1, str(700 << 20))
    assert oom.cause(CGROUP, UNIT) == (
        "it went past MemoryMax=700M of llmux-a.scope (limits.memory_max)"
    )


def test_also_when_the_cgroup_is_gone(oom: Oom, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / SLICE / UNIT)
    write(tmp_path / SLICE, 4, 4)
    assert "MemoryMax=700M" in str(oom.cause(CGROUP, UNIT))
    assert oom.cause("/llmux.slice/llmux-b.scope", "llmux-b.scope") is None, "told once"


def test_a_host_without_memory(oom: Oom, tmp_path: Path) -> None:
    write(tmp_path / SLICE / UNIT, 1, 0, str(700 << 20))
    assert oom.cause(CGROUP, UNIT) == "the host ran out of memory"


def test_the_least_limit_above_counts(oom: Oom, tmp_path: Path) -> None:
    write(tmp_path / SLICE, 3, 3, str(300 << 20))
    oom.watch(CGROUP)
    write(tmp_path / SLICE / UNIT, 1, 1)
    assert "MemoryMax=300M" in str(oom.cause(CGROUP, UNIT))


def test_without_a_memory_controller_nothing_is_said(tmp_path: Path) -> None:
    made = Oom(str(tmp_path), SLICE)
    made.watch(CGROUP)
    assert made.cause(CGROUP, UNIT) is None


@pytest.mark.parametrize(
    ("events", "cause"),
    [
        ("low 0\n", None),
        ("oom 1\n", None),
        ("oom_kill 1\n", "the host ran out of memory"),
        ("oom_kill 1\noom 1\n", "it went past MemoryMax=700M of u (limits.memory_max)"),
        ("oom_kill one\n", None),
        ("oom_kill\n", None),
    ],
)
def test_a_counter_that_is_not_told_is_zero(
    oom: Oom, tmp_path: Path, events: str, cause: str | None
) -> None:
    (tmp_path / SLICE / UNIT / "memory.events").write_text(events)
    assert oom.cause(CGROUP, "u") == cause
