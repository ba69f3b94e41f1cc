"""A process that ends between two looks: gone, whichever of the kernel's two words says so."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.criu import known_files, small_files, tree
from llmux.drivers.processes import cgroup, process
from llmux.drivers.processes.users import ModelUsers

LOOKS: list[tuple[Callable[[str], Any], Any]] = [
    (lambda proc: process.read_stat(7), None),
    (lambda proc: process.start_ticks(7), None),
    (lambda proc: cgroup.process_state(7), "X"),
    (lambda proc: cgroup.cgroup_of(7), None),
    (lambda proc: process.cpu_seconds([7, 8]), 0.0),
    (lambda proc: process.memory_bytes([7, 8]), 0),
    (lambda proc: process.find_root([7, 8]), None),
    (lambda proc: tree.read_status(7, proc), None),
    (lambda proc: tree.find_tids(7, proc), ()),
    (lambda proc: list(known_files.held_by(7, proc)), []),
    (lambda proc: small_files.find([7, 8], ["/h"], proc), {}),
]


@pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError])
@pytest.mark.parametrize(("look", "nothing"), LOOKS)
def test_what_is_gone_is_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    look: Callable[[str], Any],
    nothing: Any,
    error: type[OSError],
) -> None:
    def gone(*args: Any, **options: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", gone)
        patched.setattr(os, "listdir", gone)
        found = look(str(tmp_path))
    assert found == nothing


@pytest.mark.parametrize(("look", "nothing"), [LOOKS[0], LOOKS[3], LOOKS[7], LOOKS[8], LOOKS[10]])
def test_what_cannot_be_looked_at_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], Any], nothing: Any
) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", refused)
        patched.setattr(os, "listdir", refused)
        with pytest.raises(PermissionError):
            look(str(tmp_path))


def test_uids_are_of_processes_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "7").symlink_to("gone")
    (tmp_path / "8").mkdir()
    (tmp_path / "self").mkdir()
    users = ModelUsers("/no/such", lambda model: model, proc=str(tmp_path))
    assert list(users._look_at_processes()) == [os.geteuid()]


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_one_that_cannot_be_killed_any_more_saves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    (tmp_path / "cgroup.kill").mkdir()
    (tmp_path / "cgroup.procs").write_text("7\n8\n")
    asked: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        asked.append((pid, number))
        raise error

    monkeypatch.setattr(os, "kill", kill)
    cgroup.kill_all(str(tmp_path))
    assert asked == [(7, signal.SIGKILL), (8, signal.SIGKILL)]
