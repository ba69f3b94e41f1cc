"""A process that ends between two looks: gone, whichever of the kernel's two words says so."""

from __future__ import annotations

import asyncio
import builtins
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.criu import known_files, small_files, tree
from llmux.drivers.cuda.calls import ProcessTable
from llmux.drivers.cuda.host_memory import HostMemory
from llmux.drivers.processes import cgroup, launcher, process, spawn
from llmux.drivers.processes.inotify import Inotify
from llmux.drivers.processes.process import Process
from llmux.drivers.processes.run import run
from llmux.drivers.processes.spawn import spawn_launcher
from llmux.drivers.processes.users import ModelUsers
from llmux.ports import LaunchSpec

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


class Fault(Exception):
    """Of our own: nobody may take it for an end."""


@pytest.mark.parametrize(
    "look",
    [look for look, _ in LOOKS[:8]]
    + [
        lambda proc: cgroup.read_events(proc),
        lambda proc: cgroup.kill_all(proc),
        lambda proc: ProcessTable().start_ticks(7),
        lambda proc: ProcessTable().maps_gpu(7),
        lambda proc: HostMemory().headroom(7),
        lambda proc: launcher._descendants(1),
    ],
)
def test_a_fault_of_ours_is_not_taken_for_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], Any]
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise Fault

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", fails)
        patched.setattr(os, "listdir", lambda path: ["7"])
        patched.setattr(Path, "read_text", fails)
        with pytest.raises(Fault):
            look(str(tmp_path))


@pytest.mark.parametrize("error", [Fault(), PermissionError(), OSError(errno.EMFILE, "too many")])
def test_a_process_that_cannot_be_held_or_told_is_not_gone(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    async def body() -> None:
        held = Process.open(os.getpid())
        assert held is not None
        with monkeypatch.context() as patched:
            patched.setattr(os, "pidfd_open", fails)
            patched.setattr(signal, "pidfd_send_signal", fails)
            patched.setattr(os, "waitid", fails)
            for ask in (lambda: Process.open(7), lambda: held.signal(0), held._on_end):
                with pytest.raises(type(error)):
                    ask()
        assert held.ended is None
        held.close()

    asyncio.run(body())


def test_a_read_that_fails_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise Fault

    async def body() -> None:
        inotify, launch = Inotify(), spawn_launcher()
        with monkeypatch.context() as patched:
            patched.setattr(os, "read", fails)
            for drain in (inotify._drain, launch._read):
                with pytest.raises(Fault):
                    drain()
        inotify.close()
        launch.close()
        assert await launch.process.wait(30.0)

    asyncio.run(body())


def test_what_cannot_be_watched_is_not_gone(tmp_path: Path) -> None:
    """As when the user's inotify watches are used up."""

    class Full:
        def watch(self, *_: Any) -> Any:
            raise OSError(errno.ENOSPC, "no space left")

    full: Inotify = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="no space left"):
        asyncio.run(cgroup.wait_events(full, str(tmp_path), "populated", 0, 1.0))


def test_words_that_are_none_are_a_fault_and_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null"):
        asyncio.run(run(["a\0b"], 1.0))
    odd = LaunchSpec("m", ("x", None), {}, None, "", "", str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        spawn._encode(odd, cgroup_root=None, guardian=False)
