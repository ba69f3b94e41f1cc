"""Units without systemd: what they hold in a cgroup of ours, and what becomes of their ends."""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import io
import os
import pathlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from runtime_harness import VirtualTime

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.bare import BareUnits, find_cgroup, is_alive
from llmux.drivers.processes.children import DirectUnits, _Guarded
from llmux.drivers.processes.launcher import PR_SET_CHILD_SUBREAPER
from llmux.drivers.processes.process import Process, start_ticks
from llmux.errors import DriverTimeout, UnitFailed
from llmux.ports import LaunchSpec, UnitHandle
from llmux.protocol import Address

SECONDS = 20.0


@pytest.fixture(autouse=True)
def no_sub_reaper() -> Iterator[None]:
    """What units make of this process for good."""
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def handle_of(process: subprocess.Popen[bytes], path: str | None = None) -> UnitHandle:
    ticks = start_ticks(process.pid)
    assert ticks is not None
    return UnitHandle("m", "llmux-m", process.pid, ticks, path)


def test_a_unit_is_what_its_cgroup_holds_and_goes_with_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "home").mkdir()

    async def body() -> None:
        units = BareUnits((str(tmp_path), "/home"))
        path = units._make_cgroup(child.pid)
        other = units._make_cgroup(child.pid)
        assert path == f"/home/llmux-trial-{os.getpid()}-0" and other == path[:-1] + "1"
        directory = pathlib.Path(f"{tmp_path}{path}")
        assert (directory / "cgroup.procs").read_text() == str(child.pid)
        (directory / "engine").mkdir()
        (directory / "engine" / "cgroup.procs").write_text(f"{os.getpid()}\n")
        handle = handle_of(child, path)
        assert await units.pids(handle) == [child.pid, os.getpid()]
        (directory / "engine" / "cgroup.procs").unlink()
        await units.reap_restored(handle)
        killed: list[str] = []

        def kill_all(place: str) -> None:
            killed.append(place)
            (directory / "cgroup.procs").unlink()  # as the kernel empties it

        monkeypatch.setattr(cgroup, "kill_all", kill_all)
        told: asyncio.Queue[tuple[UnitHandle, str]] = asyncio.Queue()
        units.watch(handle, lambda *words: told.put_nowait(words))
        assert await units.terminate(handle, SECONDS)
        assert killed == [str(directory)]
        async with asyncio.timeout(SECONDS):
            assert await told.get() == (handle, "killed by SIGKILL")
        child.returncode = -9
        assert units._processes == {}
        await units.close()

    asyncio.run(body())
    left = os.listdir(tmp_path / "home")
    assert left == [f"llmux-trial-{os.getpid()}-1"]


def test_what_does_not_end_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(os, "kill", lambda pid, number: None)

    async def body() -> None:
        units = BareUnits(None)
        with pytest.raises(DriverTimeout, match="1 processes are still there after 0s"):
            await units.kill(handle_of(child), 0.0)
        assert is_alive(handle_of(child))
        assert units._make_cgroup(child.pid) is None
        units._remove_cgroup("/x")
        handle = handle_of(child)
        for other in (
            UnitHandle("m", "u", handle.pid, handle.start_ticks + 1),
            UnitHandle("m", "u", 2**22 + 1, 1),
        ):
            assert not is_alive(other)
            assert await units.pids(other) == []

    asyncio.run(body())
    monkeypatch.undo()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = handle_of(child)
    assert not is_alive(zombie)
    assert asyncio.run(BareUnits(None).pids(zombie)) == []


def test_a_cgroup_is_found_where_one_can_be_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        "22 1 0:21 / /sys rw - sysfs sysfs rw\n"
        f"25 22 0:23 / {tmp_path}/none rw - cgroup2 cgroup rw\n"
        f"26 22 0:23 / {tmp_path} rw - cgroup2 cgroup rw\n"
    )
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: rows)
    own: list[str | None] = ["/a/"]
    monkeypatch.setattr(cgroup, "cgroup_of", lambda pid: own[0])
    (tmp_path / "a").mkdir()
    assert find_cgroup() is None, "a directory without a freezer"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    real = pathlib.Path.mkdir

    def mkdir(self: pathlib.Path, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        (self / "cgroup.freeze").touch()

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    monkeypatch.setattr(pathlib.Path, "rmdir", lambda self: shutil.rmtree(self))
    assert find_cgroup() == (str(tmp_path), "/a")
    own[0] = None
    assert find_cgroup() == (str(tmp_path), "")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


# ---- children ------------------------------------------------------------------------------------


def spec(directory: pathlib.Path, model: str, *argv: str) -> LaunchSpec:
    out = str(directory / "out")
    place = str(directory / model)
    return LaunchSpec(model, argv, {"PATH": "/usr/bin:/bin"}, None, out, out, place)


def note(put: Callable[[str], None], handle: UnitHandle, words: str) -> None:
    put(words)


def test_ends_are_remembered_for_who_comes_late_but_not_for_ever(
    child: subprocess.Popen[bytes],
) -> None:
    async def body() -> None:
        units = DirectUnits()
        guardian = Process.open(child.pid)
        assert guardian is not None
        for number in range(70):
            handle = UnitHandle("m", "u", number, 1)
            read, write = os.pipe()
            guarded = _Guarded(handle, guardian, write)
            units._units["u"] = guarded
            told: list[str] = []
            units.watch(handle, partial(note, told.append))
            units._on_end(guarded, f"end {number}")
            assert told == [f"end {number}"]
            assert units._units == {}
            assert os.read(read, 1) == b"", "its lifeline is cut"
            guarded.cut()
            os.close(read)
        assert len(units._ended) == 64
        for number, words in ((69, "end 69"), (6, "end 6"), (5, "gone")):
            late: asyncio.Queue[str] = asyncio.Queue()
            units.watch(UnitHandle("m", "u", number, 1), partial(note, late.put_nowait))
            assert late.empty(), "never from within the call"
            assert await late.get() == words
        gone = UnitHandle("m", "u", 69, 1)
        seen: list[str] = []
        units.watch(gone, lambda _, words: seen.append(words))
        units.unwatch(gone)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen == []
        guardian.close()

    asyncio.run(body())


def test_what_is_left_when_all_are_closed_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two guardians whose trees are in uninterruptible sleep: no signal reaches them."""
    script = ["/bin/sh", "-c", "sleep 1000 & echo $!; wait"]
    trees = [subprocess.Popen(script, stdout=subprocess.PIPE) for _ in range(2)]
    engines = [int(tree.stdout.readline()) for tree in trees if tree.stdout is not None]

    async def body() -> None:
        units = DirectUnits()
        for model, tree, engine in zip("ab", trees, engines, strict=True):
            guardian, ticks = Process.open(tree.pid), start_ticks(engine)
            assert guardian is not None and ticks is not None
            handle = UnitHandle(model, f"llmux-{model}", engine, ticks)
            units._units[handle.unit] = _Guarded(handle, guardian, os.dup(0))
        await units.close()
        for held in units._units.values():
            held.guardian.close()

    try:
        with monkeypatch.context() as deaf, asyncio.Runner(loop_factory=VirtualTime) as runner:
            deaf.setattr(os, "kill", lambda *_: None)
            deaf.setattr(signal, "pidfd_send_signal", lambda *_: None)
            runner.run(body())
    finally:
        for tree, engine in zip(trees, engines, strict=True):
            os.kill(engine, signal.SIGKILL)
            tree.communicate()
    assert caplog.messages == [
        f"llmux-{model} is left behind, with processes {engine}, {tree.pid}: cannot kill"
        f' model "{model}": 1 of its processes are still there after 10s (a process in'
        " uninterruptible sleep (state D) waits for its driver)"
        for model, tree, engine in zip("ab", trees, engines, strict=True)
    ]


@pytest.mark.parametrize("how", ["terminate", "kill", "close"])
def test_a_unit_of_ours_from_its_start_to_its_end(tmp_path: pathlib.Path, how: str) -> None:
    async def body() -> None:
        units = DirectUnits()
        script = "trap 'exit 7' TERM; echo up; while :; do sleep 1000 & wait; done"
        handle = await units.start(spec(tmp_path, "m", "/bin/sh", "-c", script), SECONDS)
        assert (handle.model, handle.unit, handle.cgroup) == ("m", "llmux-m", None)
        pids = await units.pids(handle)
        assert pids[0] == handle.pid
        assert await units.memory_bytes(handle) > 0
        with pytest.raises(UnitFailed, match=rf"running already \(pid {handle.pid}\)"):
            await units.start(spec(tmp_path, "m", "/bin/true"), SECONDS)
        other = UnitHandle("m", "llmux-m", handle.pid, handle.start_ticks + 1)
        assert await units.pids(other) == []
        assert await units.terminate(other, SECONDS)
        await units.kill(other, SECONDS)
        assert await units.stranger(Address(uds="/x"), None) is None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            taken = Address(port=listener.getsockname()[1])
            for known in (None, handle):
                found = await units.stranger(taken, known)
                assert (found or "").startswith(f"process {os.getpid()} ")
        told: asyncio.Queue[str] = asyncio.Queue()
        units.watch(handle, lambda _, words: told.put_nowait(words))
        if how == "terminate":
            while (tmp_path / "out").read_text() != "up\n":  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert await units.terminate(handle, SECONDS)
            assert await told.get() == "exit status 7"
        elif how == "kill":
            await units.kill(handle, SECONDS)
            assert await told.get() == "killed by SIGKILL"
        else:
            await units.close()
            assert told.empty(), "nobody is told of what we end ourselves"
        assert await units.pids(handle) == []
        assert start_ticks(handle.pid) is None
        assert await units.cpu_seconds(handle) == 0
        again = await units.start(spec(tmp_path, "m", "/bin/sleep", "1000"), SECONDS)
        await units.kill(again, SECONDS)
        with pytest.raises(UnitFailed, match="cannot execute /no/such"):
            await units.start(spec(tmp_path, "m", "/no/such"), SECONDS)
        assert units._units == {}

    asyncio.run(body())


class Guardian:
    """One that does nothing by itself: after so many waits it has ended."""

    def __init__(self, waits: int) -> None:
        self.pid = os.getpid()
        self.ended: str | None = None
        self.waits = waits
        self.signals: list[int] = []

    def signal(self, number: int) -> None:
        self.signals.append(number)

    async def wait(self, timeout: float) -> bool:
        self.waits -= 1
        return self.waits <= 0


def guarded_by(guardian: Guardian) -> tuple[DirectUnits, UnitHandle]:
    units, handle = DirectUnits(), UnitHandle("m", "u", 7, 1)
    units._units["u"] = _Guarded(handle, guardian, os.dup(0))  # type: ignore[arg-type]
    return units, handle


@pytest.mark.parametrize("waits", [1, 2, 4])
def test_a_guardian_that_does_not_kill_has_its_tree_killed(
    monkeypatch: pytest.MonkeyPatch, waits: int
) -> None:
    asked: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        asked.append((pid, number))
        raise ProcessLookupError if len(asked) % 2 else PermissionError

    async def body() -> None:
        guardian = Guardian(waits)
        units, handle = guarded_by(guardian)
        await units.kill(handle, SECONDS)
        assert guardian.signals == [signal.SIGCONT]
        assert units._units["u"].gate == -1

    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe) as one, subprocess.Popen(["cat"], stdin=pipe) as two:
        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", kill)
            asyncio.run(body())
        mine = [row for row in asked if row[0] in (one.pid, two.pid)]
    rows = [(one.pid, signal.SIGKILL), (two.pid, signal.SIGKILL)]
    assert sorted(mine) == sorted(rows * (waits - 1))


def test_the_engine_itself_is_the_first_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = {30: os.getpid(), 10: 30, 20: 30}  # pids begin anew at some time

    def opened(path: str, mode: str) -> io.BytesIO:
        pid = int(path.split("/")[2])
        return io.BytesIO(f"{pid} (n) S {parents[pid]} {'0 ' * 17}{pid} 0".encode())

    async def body() -> None:
        guardian = Guardian(1)
        units, handle = guarded_by(guardian)
        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", lambda path: ["20", "10", "self", "30"])
            patched.setattr(builtins, "open", opened)
            found = await units.pids(handle)
        assert found == [30, 10, 20]
        assert await units.observe() == [handle]
        guardian.ended = "exit status 0"
        assert await units.pids(handle) == []
        assert await units.observe() == []
        units._units["u"].cut()

    asyncio.run(body())


def test_who_holds_an_engines_socket_is_a_stranger_to_it(tmp_path: pathlib.Path) -> None:
    async def body() -> None:
        units, handle = guarded_by(Guardian(1))
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            found = await units.stranger(Address(uds=path), handle)
            assert (found or "").startswith(f"process {os.getpid()} ")
            assert await units.stranger(Address(uds=path), None) is None
        units._units["u"].cut()

    asyncio.run(body())


def test_an_engine_that_is_gone_at_once_has_started(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start cannot be read any more; how it ended is told by its guardian."""
    real, first = open, list[str]()

    def opened(path: Any, *words: Any, **options: Any) -> Any:
        if str(path).endswith("/stat"):
            first.append(path)
            if path != first[0]:
                raise FileNotFoundError(path)
        return real(path, *words, **options)

    async def body() -> None:
        units = DirectUnits()
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "open", opened)
            handle = await units.start(spec(tmp_path, "m", "/bin/sh", "-c", "exit 3"), SECONDS)
        assert handle.start_ticks == 0
        told: asyncio.Queue[str] = asyncio.Queue()
        units.watch(handle, lambda _, words: told.put_nowait(words))
        async with asyncio.timeout(SECONDS):
            assert await told.get() == "exit status 3"

    asyncio.run(body())
