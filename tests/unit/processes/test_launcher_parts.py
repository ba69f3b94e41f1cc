"""Programs that are run and launchers that are held ready, file system events and family."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import struct
import sys
from functools import partial
from pathlib import Path

import pytest

from llmux.drivers.processes import launcher, spawn
from llmux.drivers.processes.directories import prepare_directories
from llmux.drivers.processes.inotify import Inotify, Mask
from llmux.drivers.processes.process import start_ticks
from llmux.drivers.processes.run import Completed, run
from llmux.drivers.processes.spawn import Launchers, model_of, spawn_launcher, unit_name
from llmux.errors import DriverError, DriverTimeout, UnitFailed, Unsupported
from llmux.ports import EngineUser, LaunchSpec

SECONDS = 20.0


def spec_of(place: Path, *argv: str, **fields: object) -> LaunchSpec:
    out = str(place / "out")
    values = {"env": {"PATH": "/usr/bin:/bin"}, "user": None, "stdout": out, "stderr": out}
    return LaunchSpec("m", argv, runtime_dir=str(place / "run"), **{**values, **fields})  # type: ignore[arg-type]


# ---- launchers -----------------------------------------------------------------------------------


def test_one_launcher_is_held_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spawn, "READY_DELAY", 0.0)

    async def body() -> None:
        held = Launchers()
        await held.close()  # nothing was made
        first = held.prepare()
        assert held.prepare() is first
        assert held.take() is first
        assert first.process.ended is None
        second = held.take()
        assert second is not first
        for launch in (first, second):
            await launch.ready.wait()
            launch.close()
            assert await launch.process.wait(SECONDS)
            assert launch.process.code == 0, "its gate was closed"
        async with asyncio.timeout(SECONDS):
            while held._ready is None:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0)
        third = held.prepare()
        third.process.signal(signal.SIGKILL)
        assert await third.process.wait(SECONDS)
        fourth = held.take()  # not one that has ended
        assert fourth is not third
        fourth.close()
        assert await fourth.process.wait(SECONDS)
        ready = held.prepare()
        await held.close()
        assert ready.process.ended is not None

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(body())
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_program_takes_the_launchers_place(tmp_path: Path) -> None:
    async def body() -> None:
        launch = spawn_launcher()
        async with asyncio.timeout(SECONDS):
            await launch.ready.wait()
        launch._read()  # when there is nothing to read
        assert not launch._eof.is_set()
        script = "umask; ulimit -c; pwd; echo $A; exit 5"
        spec = spec_of(tmp_path, "/bin/sh", "-c", script, env={"A": "x y"}, cwd="/usr")
        await launch.open(spec, SECONDS, cgroup_root=None, guardian=False)
        assert launch.engine_pid == launch.process.pid
        assert await launch.process.wait(SECONDS)
        assert launch.process.code == 5
        for _ in range(2):
            launch.close()
        assert launch.take_gate() == -1

    asyncio.run(body())
    assert (tmp_path / "out").read_text().splitlines() == ["0007", "0", "/usr", "x y"]


@pytest.mark.parametrize(
    ("argv", "fields", "said", "number"),
    [
        (("/no/such",), {}, "cannot execute /no/such: No such file or directory", errno.ENOENT),
        (("/bin/true",), {"cwd": "/no/such"},
         "cannot change to directory /no/such: No such file or directory", errno.ENOENT),
        (("/bin/true",), {"stdout": "/no/such/out"},
         "cannot open /no/such/out: No such file or directory", errno.ENOENT),
        (("/bin/true", "a\0b"), {},
         "a NUL character in the command line or in the environment", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("guardian", [False, True])
def test_why_a_program_could_not_be_started_is_said_once(
    tmp_path: Path,
    argv: tuple[str, ...],
    fields: dict[str, object],
    said: str,
    number: int | None,
    guardian: bool,
) -> None:
    async def body() -> None:
        launch = spawn_launcher()
        try:
            with pytest.raises(UnitFailed) as raised:
                spec = spec_of(tmp_path, *argv, **fields)
                await launch.open(spec, SECONDS, cgroup_root=None, guardian=guardian)
            assert str(raised.value) == f'cannot start model "m": {said}'
            if number is not None:
                assert raised.value.fields["errno"] == number
        finally:
            launch.close()
            assert await launch.process.wait(SECONDS)
            launch.process.close()

    asyncio.run(body())


def test_a_launcher_that_ends_or_hangs_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        spec = spec_of(tmp_path, "/bin/true")
        launch = spawn_launcher()
        launch.process.signal(signal.SIGKILL)
        assert await launch.process.wait(SECONDS)
        text = "its launcher ended before it could exec /bin/true: killed by SIGKILL"
        with pytest.raises(UnitFailed, match=text):
            await launch.open(spec, SECONDS, cgroup_root=None, guardian=False)
        launch.close()
        launch = spawn_launcher()
        launch.process.signal(signal.SIGSTOP)
        with pytest.raises(DriverTimeout, match=r"did not exec within 0\.01s"):
            await launch.open(spec, 0.01, cgroup_root=None, guardian=False)
        launch.process.signal(signal.SIGKILL)
        launch.close()
        assert await launch.process.wait(SECONDS)

    asyncio.run(body())


def test_none_is_made_any_more_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "READY_DELAY", 0.0)

    async def body() -> None:
        held = Launchers()
        launch = held.take()
        await held.close()
        launch.close()
        assert await launch.process.wait(SECONDS)
        assert held._ready is None

    asyncio.run(body())


def test_without_an_interpreter_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(UnitFailed, match="cannot run /no/such/python: No such file"):
            spawn_launcher()
        held = Launchers()
        held._make_ready()
        assert held._ready is None
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(body())


def test_a_spec_says_all_that_the_launcher_does(tmp_path: Path) -> None:
    user = EngineUser("u", 70, 71, "/h", (5, 9), temporary="/h/tmp")
    spec = spec_of(tmp_path, "a", "b", env={"X": "1=2"}, user=user)
    argv, env, options = launcher.decode_spec(spawn._encode(spec, cgroup_root="/cg", guardian=True))
    assert (argv, env) == ([b"a", b"b"], {b"X": b"1=2"})
    out = str(tmp_path / "out")
    assert options == {
        "stdout": out, "stderr": out, "cwd": "/", "deny_io_uring": options["deny_io_uring"],
        "cgroup_root": "/cg", "guardian": "1", "user": "u", "uid": "70", "gid": "71",
        "groups": "5,9", "temporary": "/h/tmp",
    }  # fmt: skip
    plain = spec_of(tmp_path, "a", deny_io_uring=True)
    assert launcher.decode_spec(spawn._encode(plain, cgroup_root=None, guardian=False))[2] == {
        "stdout": out, "stderr": out, "cwd": "/", "deny_io_uring": "1",
    }  # fmt: skip
    assert unit_name("m", "") == "llmux-m"
    assert model_of("llmux-a.b.scope") == "a.b"


# ---- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdout", "stderr", "excerpt"),
    [
        ("out\n", " \n", "out"),
        ("out", "err\n", "err"),
        ("1\n2\n3\n4\n5\n6", "", "2; 3; 4; 5; 6"),
        ("x" * 700, "", "x" * 600),
        ("", "", ""),
    ],
)
def test_the_last_lines_are_what_an_error_quotes(stdout: str, stderr: str, excerpt: str) -> None:
    assert Completed(("x",), 1, stdout, stderr).excerpt == excerpt


def test_a_program_gets_what_is_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LD_LIBRARY_PATH", "TMPDIR", "SECRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "" if name == "LD_LIBRARY_PATH" else f"/{name}")
    script = "pwd; env; kill -9 $$"
    done = asyncio.run(run(["/bin/sh", "-c", script], SECONDS, env={"TMPDIR": "/t"}, cwd="/usr"))
    lines = done.stdout.splitlines()
    assert (done.code, done.argv, lines[0]) == (-9, ("/bin/sh", "-c", script), "/usr")
    assert {"LC_ALL=C.UTF-8", "TMPDIR=/t", "CUDA_VISIBLE_DEVICES=/CUDA_VISIBLE_DEVICES"} < {*lines}
    assert "SECRET" not in done.stdout
    (tmp_path / "closed").write_text("")
    with pytest.raises(Unsupported, match="Permission denied") as raised:
        asyncio.run(run([str(tmp_path / "closed")], SECONDS))
    assert "on the PATH" in (raised.value.hint or "")
    (tmp_path / "closed").chmod(0o755)
    (tmp_path / "closed").write_text("no program")
    with pytest.raises(DriverError, match="Exec format error"):
        asyncio.run(run([str(tmp_path / "closed")], SECONDS))
    done = asyncio.run(run(["/bin/sh", "-c", "printf abcdef >&2"], SECONDS, output_cap=3))
    assert done.stderr == "def"


def test_who_is_cancelled_leaves_no_program(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")

    async def body() -> None:
        script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
        task = asyncio.ensure_future(run(["/bin/sh", "-c", script], 1000))
        pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert start_ticks(pid) is None

    asyncio.run(body())


# ---- events of files -----------------------------------------------------------------------------


def test_lost_events_are_told_to_everyone_and_a_file_that_is_gone_once(tmp_path: Path) -> None:
    async def body() -> None:
        inotify = Inotify()
        told: list[tuple[str, Mask, str]] = []

        def tell(name: str, mask: Mask, file: str) -> None:
            told.append((name, mask, file))

        for name in ("a", "b"):
            (tmp_path / name).touch()
            inotify.watch(str(tmp_path / name), Mask.MODIFY, partial(tell, name))
        with pytest.raises(FileNotFoundError) as raised:
            inotify.watch(str(tmp_path / "none"), Mask.MODIFY, lambda *_: None)
        assert raised.value.filename == str(tmp_path / "none")
        inotify._drain()
        assert told == []
        real = inotify._fd
        read, write = os.pipe()
        os.set_blocking(read, False)
        inotify._fd = read
        number = next(iter(inotify._watches))
        event = struct.Struct("iIII")
        os.write(write, event.pack(-1, Mask.Q_OVERFLOW, 0, 0)
                 + event.pack(number, Mask.MODIFY, 0, 8) + b"name\0\0\0\0"
                 + event.pack(number, Mask.CREATE, 0, 0) + event.pack(99, Mask.MODIFY, 0, 0)
                 + event.pack(number, Mask.IGNORED, 0, 0)
                 + event.pack(number, Mask.MODIFY, 0, 0))  # fmt: skip
        inotify._drain()
        assert told == [
            ("a", Mask.MODIFY, ""), ("b", Mask.MODIFY, ""), ("a", Mask.MODIFY, "name"),
            ("a", Mask.IGNORED, ""),
        ]  # fmt: skip
        assert len(inotify._watches) == 1
        for fd in (read, write):
            os.close(fd)
        inotify._fd = real
        for _ in range(2):
            inotify.close()
        assert inotify._watches == {}

    asyncio.run(body())


def test_a_directory_that_cannot_be_made_is_named_with_its_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = LaunchSpec("m", ("x",), {}, None, "", "", str(tmp_path / "file" / "run"))
    with pytest.raises(UnitFailed) as raised:
        prepare_directories(spec)
    assert str(raised.value) == (
        f'cannot start model "m": cannot make its directory {tmp_path}/file/run: Not a directory'
    )
    place = tmp_path / "run"
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        prepare_directories(LaunchSpec("m", ("x",), {}, None, "", "", str(place)))
        assert place.stat().st_mode & 0o7777 == (0o2750 if os.geteuid() == 0 else 0o700)
        assert os.listdir(place) == []
        (place / "api.sock").touch()
        (place / "d" / "e").mkdir(parents=True)
        (place / "d" / "e" / "f").touch()
    assert len(os.listdir("/proc/self/fd")) == before
