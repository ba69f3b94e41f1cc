"""The supervisor's half of the gate: what a launcher inherits, and how what it says is read."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from llmux.drivers.processes.spawn import Launch, Launchers, spawn_launcher
from llmux.errors import UnitFailed
from llmux.ports import LaunchSpec

SECONDS = 30.0


def spec_of(place: Path, *argv: str) -> LaunchSpec:
    out = str(place / "out")
    return LaunchSpec("m", argv, {"PATH": "/usr/bin:/bin"}, None, out, out, str(place))


def launched(body: Callable[[Launch], Awaitable[None]]) -> None:
    async def main() -> None:
        launch = spawn_launcher()
        try:
            await body(launch)
        finally:
            launch.close()
            assert await launch.process.wait(SECONDS)
            launch.process.close()

    asyncio.run(main())


@pytest.fixture
def odd_signals() -> Iterator[None]:
    """Of a supervisor started by nohup(1), or by who blocks some."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.usefixtures("odd_signals")
def test_a_program_has_no_signal_ignored_or_blocked_although_we_have(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        spec = spec_of(tmp_path, "/bin/cat", "/proc/self/status")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=False)
        assert await launch.process.wait(SECONDS)

    launched(body)
    lines = dict(line.split(":\t") for line in (tmp_path / "out").read_text().splitlines())
    # but for two of the C library's own, 32 and 33
    assert int(lines["SigIgn"], 16) & 0x7FFFFFFF == int(lines["SigBlk"], 16) == 0


def test_the_status_pipe_is_given_up_once_the_program_runs(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        status = launch._status
        spec = spec_of(tmp_path, "/bin/sleep", "1000")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=False)
        assert not asyncio.get_running_loop().remove_reader(status), "it would be busy with it"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(status)
        assert launch.process.ended is None
        launch.process.signal(signal.SIGKILL)

    launched(body)


# ---- what a launcher says ------------------------------------------------------------------------

GATE = "head -c 1 <&4 >/dev/null\n"


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A shell script in the place of Python and of the launcher."""

    def be(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return be


@pytest.mark.parametrize(
    ("script", "words", "number"),
    [
        ("echo 'E2 cannot x: No such file or directory' >&3", "cannot x: No such file or directory",
         2),
        ("echo 'E1 it belongs to user 5' >&3", "it belongs to user 5 (Operation not permitted)", 1),
        ("echo 'E0 odd' >&3", "odd", 0),
        ("echo 'E odd' >&3", "odd", 0),
        ("echo 'E0 Success is not enough' >&3", "Success is not enough", 0),
        ("echo P7 >&3; echo X >&3; echo 'E13 no' >&3", "no (Permission denied)", 13),
        ("echo XX >&3; exit 3", "its launcher ended before it could exec /bin/true: exit status 3",
         None),
        # its end comes later than the end of what it says
        ("exec 3>&-; /bin/true; /bin/true; exit 4",
         "its launcher ended before it could exec /bin/true: exit status 4", None),
    ],
)  # fmt: skip
def test_what_it_says_is_told(
    tmp_path: Path,
    interpreter: Callable[[str], None],
    script: str,
    words: str,
    number: int | None,
) -> None:
    interpreter(f"echo R >&3; {GATE}{script}")

    async def body(launch: Launch) -> None:
        with pytest.raises(UnitFailed) as raised:
            spec = spec_of(tmp_path, "/bin/true")
            await launch.open(spec, SECONDS, cgroup_root=None, guardian=False)
        assert str(raised.value) == f'cannot start model "m": {words}'
        assert raised.value.fields.get("errno") == number

    launched(body)


@pytest.mark.parametrize(("path", "seen"), [("/bin:/x", "/bin:/x"), (None, os.defpath)])
def test_it_gets_a_path_and_a_locale_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interpreter: Callable[[str], None],
    path: str | None,
    seen: str,
) -> None:
    monkeypatch.setenv("SECRET", "x")
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    interpreter(f'{GATE}tr "\\0" " " < /proc/$$/environ > {tmp_path}/env; echo P77 >&3; echo X >&3')

    async def body(launch: Launch) -> None:
        spec = spec_of(tmp_path, "/bin/true")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=True)
        assert launch.engine_pid == 77

    launched(body)
    assert sorted((tmp_path / "env").read_text().split()) == ["LC_ALL=C.UTF-8", f"PATH={seen}"]


# ---- held ready ----------------------------------------------------------------------------------


def test_after_each_that_is_taken_another_is_made_ready() -> None:
    async def body() -> None:
        held = Launchers()
        taken = []
        for _ in range(3):
            taken.append(held.take())
            due = held._timer
            assert due is not None and not due.cancelled()
            due.cancel()
            held._make_ready()  # as if its time had come
            assert held._timer is None
        assert len({launch.process.pid for launch in taken}) == 3
        last = held.prepare()
        assert last not in taken
        await held.close()
        assert last.process.ended is not None
        for launch in taken:
            launch.close()
            assert await launch.process.wait(SECONDS)

    asyncio.run(body())
