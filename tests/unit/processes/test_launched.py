"""What a launched program finds: its files, user, limits and session; and why there is none."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmux.drivers.processes.cgroup import cgroup_of
from llmux.drivers.processes.spawn import Launch, spawn_launcher
from llmux.errors import UnitFailed
from llmux.ports import EngineUser, LaunchSpec

SECONDS = 20.0
UID = 60901
IO_URING_SETUP, X32 = 425, 0x40000000  # <asm-generic/unistd.h>, <asm/unistd.h>
LOOK = "umask; ulimit -c; ulimit -Hc; ls -l /proc/self/fd; cat /proc/self/status"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def home() -> Iterator[Path]:
    """Where another user can reach it, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def user(home: Path, **fields: Any) -> EngineUser:
    values = {"groups": (UID + 2, UID + 3), "temporary": f"{home}/tmp", **fields}
    return EngineUser("llmux-x", UID, UID + 1, str(home), **values)


def launch(
    place: Path,
    *argv: str,
    cgroup_root: str | None = None,
    guardian: bool = False,
    started: Callable[[Launch], None] = lambda _: None,
    **fields: Any,
) -> dict[str, str]:
    """Run to its end; its output as fields, by the first word of each line."""
    output = {name: str(place / name) for name in ("stdout", "stderr")}
    values = {"env": {"PATH": "/usr/bin:/bin"}, "user": None, **output, **fields}
    spec = LaunchSpec("m", argv, runtime_dir=str(place), **values)

    async def body() -> None:
        made = spawn_launcher()
        try:
            await made.open(spec, SECONDS, cgroup_root=cgroup_root, guardian=guardian)
            started(made)
            assert await made.process.wait(SECONDS)
            assert made.process.ended == "exit status 0"
        finally:
            made.close()
            assert await made.process.wait(SECONDS)
            made.process.close()

    asyncio.run(body())
    assert Path(spec.stderr).read_text() == ""
    lines = Path(spec.stdout).read_text().splitlines()
    return {line.split()[0].rstrip(":"): " ".join(line.split()[1:]) for line in lines}


@pytest.fixture
def own_input(tmp_path: Path) -> Iterator[None]:
    """An input of the supervisor's, which is no engine's."""
    kept = os.dup(0)
    ours = os.open(tmp_path / "input", os.O_CREAT | os.O_RDONLY)
    os.dup2(ours, 0)
    yield
    os.dup2(kept, 0)
    os.close(kept)
    os.close(ours)


@pytest.mark.usefixtures("own_input")
@pytest.mark.parametrize("guardian", [False, True])
@pytest.mark.parametrize("deny", [False, True])
def test_a_program_has_its_three_files_no_core_and_the_usual_signals(
    tmp_path: Path, guardian: bool, deny: bool
) -> None:
    (tmp_path / "stdout").write_text("before: kept\n")
    found = launch(tmp_path, "/bin/sh", "-c", LOOK, guardian=guardian, deny_io_uring=deny)
    assert found["before"] == "kept"
    lines = (tmp_path / "stdout").read_text().splitlines()
    assert lines[1:3] == ["0007", "0"]
    links = [line.partition(" -> ")[::2] for line in lines if " -> " in line]
    assert [(left.split()[-1], right) for left, right in links[:3]] == [
        ("0", "/dev/null"),
        ("1", str(tmp_path / "stdout")),
        ("2", str(tmp_path / "stderr")),
    ]
    assert len(links) == 4, "and the directory that is listed"
    # but for two of the C library's own, 32 and 33, which it lets nobody set
    assert int(found["SigIgn"], 16) & 0x7FFFFFFF == int(found["SigBlk"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == (("1", "2") if deny else ("0", "0"))
    assert stat.S_IMODE((tmp_path / "stderr").stat().st_mode) == 0o640


def refusals(numbers: Sequence[int]) -> list[int]:
    """What the kernel says to system calls with bad arguments."""
    libc = ctypes.CDLL(None, use_errno=True)
    said = []
    for number in numbers:
        assert libc.syscall(number, -1, 0, 0, 0, 0, 0) == -1
        said.append(ctypes.get_errno())
    return said


@pytest.mark.parametrize("deny", [False, True])
def test_of_all_system_calls_only_io_urings_first_is_denied(tmp_path: Path, deny: bool) -> None:
    numbers = [424, IO_URING_SETUP, 426, IO_URING_SETUP | X32, 3]
    script = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for n in {numbers}: print(n, libc.syscall(n, -1, 0, 0, 0, 0, 0), ctypes.get_errno())"
    )
    argv = (sys.executable, "-I", "-S", "-c", script)
    found = launch(tmp_path, *argv, deny_io_uring=deny)
    for number, said in zip(numbers, refusals(numbers), strict=True):
        denied = deny and number & ~X32 == IO_URING_SETUP
        assert found[str(number)] == f"-1 {errno.ENOSYS if denied else said}"


def test_a_program_leads_a_session_of_its_own_and_its_guardian_another(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")

    def look(made: Launch) -> None:
        pids = {made.process.pid, made.engine_pid}
        assert {os.getsid(pid) for pid in pids} == pids
        (tmp_path / "go").write_text("\n")

    for guardian in (False, True):
        script = f"read x < {tmp_path}/go"
        launch(tmp_path, "/bin/sh", "-c", script, guardian=guardian, started=look)


@as_root
@pytest.mark.parametrize("guardian", [False, True])
def test_a_program_of_another_user_has_nothing_of_ours(
    tmp_path: Path, home: Path, guardian: bool
) -> None:
    os.chown(home, UID, -1)
    for _ in range(2):  # the second finds the directory
        found = launch(tmp_path, "/bin/sh", "-c", LOOK, guardian=guardian, user=user(home))
        assert found["Uid"] == f"{UID} {UID} {UID} {UID}"
        assert found["Gid"] == " ".join([str(UID + 1)] * 4)
        assert found["Groups"] == f"{UID + 2} {UID + 3}"
        sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        assert {int(found[name], 16) for name in sets} == {0}
        made = (home / "tmp").stat()
        assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (UID, UID + 1, 0o700)


def test_who_is_the_user_already_stays_as_it_is(tmp_path: Path) -> None:
    me = EngineUser("me", os.geteuid(), os.getegid() + 7, "/", (5,), temporary=None)
    found = launch(tmp_path, "/bin/cat", "/proc/self/status", user=me)
    mine = Path("/proc/self/status").read_text()
    for name in ("Uid", "Gid", "Groups", "CapEff", "CapBnd"):
        (line,) = [line for line in mine.splitlines() if line.startswith(f"{name}:")]
        assert found[name] == " ".join(line.split()[1:])


def test_it_moves_into_a_cgroup_below_its_own(tmp_path: Path) -> None:
    root = tmp_path / "cgroups"
    for _ in range(2):
        launch(tmp_path, "/bin/true", cgroup_root=str(root))
        procs = Path(f"{root}{cgroup_of(os.getpid())}/engine/cgroup.procs")
        assert procs.read_text() == "0"


def no_program(place: Path, said: str, number: int, **fields: Any) -> None:
    with pytest.raises(UnitFailed) as raised:
        launch(place, "/bin/true", **fields)
    assert str(raised.value) == f'cannot start model "m": {said}'
    assert raised.value.fields["errno"] == number


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_goes_through_no_link(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "victim")
    said = f"cannot open {tmp_path}/{name}: {os.strerror(errno.ELOOP)}"
    no_program(tmp_path, said, errno.ELOOP)
    assert not (tmp_path / "victim").exists()


@as_root
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_goes_to_no_file_of_another_user(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    os.chown(tmp_path / name, UID, UID)
    said = f"cannot open {tmp_path}/{name}: it belongs to user {UID}"
    no_program(tmp_path, f"{said} (Operation not permitted)", errno.EPERM)


@as_root
def test_a_user_that_nobody_can_be_is_refused(tmp_path: Path, home: Path) -> None:
    odd = user(home, groups=(2**32 - 1,))
    said = "cannot become user llmux-x: Invalid argument"
    no_program(tmp_path, said, errno.EINVAL, user=odd)
    said = f"cannot make {home}/tmp: Permission denied"
    no_program(tmp_path, said, errno.EACCES, user=user(home))


def test_a_cgroup_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = "cannot make the engine's cgroup: Not a directory"
    no_program(tmp_path, said, errno.ENOTDIR, cgroup_root=str(tmp_path / "file"))


def test_a_fault_of_the_launcher_itself_is_told(tmp_path: Path) -> None:
    odd = EngineUser("me", "x", 0, "/")  # type: ignore[arg-type]
    with pytest.raises(UnitFailed, match=r"internal error in the launcher: ValueError\(") as raised:
        launch(tmp_path, "/bin/true", user=odd)
    assert raised.value.fields["errno"] == 0
