"""Cgroups in a directory of ours: what is in one, frozen, killed, and killed for memory."""

from __future__ import annotations

import asyncio
import builtins
import errno
import os
import pathlib
import subprocess
from typing import Any

import pytest
from runtime_harness import VirtualTime

from llmux.drivers.processes import cgroup
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.drivers.processes.inotify import Inotify
from llmux.drivers.processes.oom import Oom
from llmux.errors import FreezeFailed, Unsupported
from llmux.ports import UnitHandle

NOBODY = 2**22 + 1
SECONDS = 20.0


def group(directory: pathlib.Path, frozen: int = 0, populated: int = 1) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = f"populated {populated}\nfrozen {frozen}\n"
    (directory / "cgroup.events").write_text(text)
    return directory


def test_what_a_cgroup_holds_below_it_too(tmp_path: pathlib.Path) -> None:
    group(tmp_path / "a")
    for name, pids in (("a", "7\n0\n"), ("a/b", "8\n"), ("a/b/c", "9\n10\n")):
        group(tmp_path / name)
        (tmp_path / name / "cgroup.procs").write_text(pids)
    (tmp_path / "a" / "d").mkdir()
    assert sorted(cgroup.read_procs(str(tmp_path / "a"))) == [7, 8, 9, 10]
    assert cgroup.read_procs(str(tmp_path / "gone")) == []
    (tmp_path / "a" / "d" / "cgroup.procs").symlink_to("gone")  # between two looks
    assert sorted(cgroup.read_procs(str(tmp_path / "a"))) == [7, 8, 9, 10]
    assert cgroup.read_events(str(tmp_path / "a")) == {"populated": 1, "frozen": 0}
    assert cgroup.read_events(str(tmp_path / "gone")) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        cgroup.read_events(str(tmp_path / "file"))
    assert cgroup.engine_directory("/sys/fs/cgroup", "/a/b") == "/sys/fs/cgroup/a/b/engine"
    cgroup.write_freeze(str(tmp_path / "a"), "1")
    assert (tmp_path / "a" / "cgroup.freeze").read_text() == "1"


def test_the_cgroup_of_a_process_is_the_unified_one() -> None:
    mine = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    expected = next((line[3:] for line in mine if line.startswith("0::")), None)
    assert cgroup.cgroup_of(os.getpid()) == expected
    assert cgroup.cgroup_of(NOBODY) is None


@pytest.mark.parametrize("how", ["by the kernel", "one by one", "gone"])
def test_everything_in_a_cgroup_is_killed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    killed: list[int] = []
    real = os.kill

    def kill(pid: int, number: int) -> None:
        killed.append(pid)
        real(pid, number)

    monkeypatch.setattr(os, "kill", kill)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        directory = tmp_path / "a"
        if how != "gone":
            group(directory)
            procs = f"{NOBODY}\n{child.pid}\n"
            (directory / "cgroup.procs").write_text(procs)
        if how == "by the kernel":
            (directory / "cgroup.kill").write_text("")
        elif how == "one by one":
            (directory / "cgroup.kill").mkdir()
        cgroup.kill_all(str(directory))
        if how == "one by one":
            assert child.wait(SECONDS) == -9
            assert killed == [NOBODY, child.pid]
        else:
            assert killed == []
        if how == "by the kernel":
            assert (directory / "cgroup.kill").read_text() == "1"
    if how == "gone":
        assert not directory.exists()


@pytest.mark.parametrize(
    ("key", "value", "then", "seen"),
    [
        ("frozen", 0, "nothing", True),
        ("frozen", 1, "nothing", False),
        ("frozen", 1, "it is", True),
        ("frozen", 1, "it goes", False),
        ("populated", 0, "it goes", True),
        ("populated", 1, "it goes", False),
        ("populated", 0, "it is gone", True),
        ("frozen", 0, "it is gone", False),
        ("populated", 1, "it is gone", False),
    ],
)
def test_a_change_is_awaited(
    tmp_path: pathlib.Path, key: str, value: int, then: str, seen: bool
) -> None:
    async def body() -> None:
        inotify = Inotify()
        directory = tmp_path / "a"
        if then != "it is gone":
            group(
                directory, populated=1 if (key, value, then) != ("populated", 1, "it goes") else 0
            )
        timeout = 0.01 if then == "nothing" else SECONDS
        waiting = asyncio.ensure_future(
            cgroup.wait_events(inotify, str(directory), key, value, timeout)
        )
        await asyncio.sleep(0)
        if then == "it is":
            group(directory, frozen=1)
        elif then == "it goes":
            (directory / "cgroup.events").unlink()
        assert await waiting is seen
        assert inotify._watches == {}
        inotify.close()

    asyncio.run(body())


def test_a_change_in_the_last_second_is_seen_too(tmp_path: pathlib.Path) -> None:
    async def body() -> None:
        inotify = Inotify()
        directory = str(group(tmp_path / "a"))
        waiting = asyncio.ensure_future(cgroup.wait_events(inotify, directory, "frozen", 1, 0.9))
        await asyncio.sleep(0)
        group(tmp_path / "a", frozen=1)
        assert await waiting
        inotify.close()

    asyncio.run(body())


def test_it_is_looked_at_ever_more_rarely_but_four_times_a_second(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(group(tmp_path / "a"))
    looks: list[str] = []
    real = builtins.open

    def opened(path: Any, *words: Any, **options: Any) -> Any:
        looks.append(path)
        return real(path, *words, **options)

    async def body() -> None:
        inotify = Inotify()
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "open", opened)
            assert not await cgroup.wait_events(inotify, directory, "frozen", 1, 100.0)
        inotify.close()

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(body())
    assert 400 <= looks.count(f"{directory}/cgroup.events") <= 420


class Unit:
    """A unit's cgroup in a directory; what is written is what the kernel then says, or not."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.engine = root / "u" / "engine"
        self.handle = UnitHandle("m", "llmux-m.scope", 7, 1, "/u")
        self.freezer = CgroupFreezer(str(root))

    def written(self) -> str:
        return (self.engine / "cgroup.freeze").read_text()


@pytest.fixture
def unit(tmp_path: pathlib.Path) -> Unit:
    group(tmp_path / "u" / "engine")
    return Unit(tmp_path)


def test_frozen_and_thawed_is_what_the_kernel_says(unit: Unit) -> None:
    async def body() -> None:
        group(unit.engine, frozen=1)
        await unit.freezer.freeze(unit.handle, SECONDS)
        assert unit.written() == "1"
        assert await unit.freezer.frozen(unit.handle)
        group(unit.engine, frozen=0)
        await unit.freezer.thaw(unit.handle, SECONDS)
        assert unit.written() == "0"
        assert await unit.freezer.frozen(unit.handle) is False
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            await unit.freezer.close()
        await unit.freezer.thaw(unit.handle, SECONDS)  # with another descriptor
        await unit.freezer.close()
        await asyncio.get_running_loop().shutdown_default_executor()  # where it is closed
        assert len(os.listdir("/proc/self/fd")) == descriptors - 1

    asyncio.run(body())


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([os.getpid(), NOBODY], "not all of its 2 processes stopped within 0.01s"),
        ([], "llmux-m.scope is gone"),
    ],
)
def test_what_does_not_freeze_is_thawed_again(unit: Unit, members: list[int], words: str) -> None:
    (unit.engine / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in members))

    async def body() -> None:
        with pytest.raises(FreezeFailed) as raised:
            await unit.freezer.freeze(unit.handle, 0.01)
        assert words in str(raised.value)
        assert "uninterruptible" not in str(raised.value)
        assert unit.written() == "0"

    asyncio.run(body())


def test_one_that_goes_while_it_is_frozen_is_gone(
    unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit.engine / "cgroup.procs").write_text("7\n")
    monkeypatch.setattr(cgroup, "wait_events", not_in_time)
    (unit.engine / "cgroup.events").unlink()
    with pytest.raises(FreezeFailed, match=r"llmux-m\.scope is gone"):
        asyncio.run(unit.freezer.freeze(unit.handle, 1.0))


async def not_in_time(*_: Any) -> bool:
    return False


def test_those_that_hang_in_the_kernel_are_counted(
    unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit.engine / "cgroup.procs").write_text("7\n8\n9\n")
    monkeypatch.setattr(cgroup, "process_state", lambda pid: "D" if pid != 8 else "S")

    async def body() -> None:
        with pytest.raises(FreezeFailed, match=r"its 3 processes .*, 2 in uninterruptible sleep"):
            await unit.freezer.freeze(unit.handle, 0.01)

    asyncio.run(body())


def test_who_is_cancelled_leaves_nothing_frozen(unit: Unit) -> None:
    async def body() -> None:
        waiting = asyncio.ensure_future(unit.freezer.freeze(unit.handle, SECONDS))
        await asyncio.sleep(0)
        assert unit.written() == "1"
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert unit.written() == "0"

    asyncio.run(body())


def test_one_that_stays_frozen_has_a_frozen_parent(unit: Unit) -> None:
    async def body() -> None:
        group(unit.engine, frozen=1)
        with pytest.raises(FreezeFailed, match=r"still frozen after 0\.01s") as raised:
            await unit.freezer.thaw(unit.handle, 0.01)
        assert "llmux.slice" in (raised.value.hint or "")
        (unit.engine / "cgroup.events").unlink()
        with pytest.raises(FreezeFailed, match=r"thaw.*llmux-m\.scope is gone"):
            await unit.freezer.thaw(unit.handle, SECONDS)
        assert await unit.freezer.frozen(unit.handle) is False

    asyncio.run(body())


@pytest.mark.parametrize("verb", ["freeze", "thaw", "observe"])
def test_a_unit_without_a_cgroup_is_refused(unit: Unit, verb: str) -> None:
    handle = UnitHandle("m", "m", 7, 1)
    calls: dict[str, Any] = {
        "freeze": lambda: unit.freezer.freeze(handle, 1),
        "thaw": lambda: unit.freezer.thaw(handle, 1),
        "observe": lambda: unit.freezer.frozen(handle),
    }
    with pytest.raises(Unsupported, match=f"cannot {verb} .*has no cgroup of its own") as raised:
        asyncio.run(calls[verb]())
    assert "under systemd" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("number", "there", "kind", "words"),
    [
        (errno.ENOENT, True, Unsupported, "no cgroup.freeze"),
        (errno.ENODEV, True, Unsupported, "no cgroup.freeze"),
        (errno.ENOENT, False, FreezeFailed, "is gone"),
        (errno.ENODEV, False, FreezeFailed, "is gone"),
        (errno.EACCES, True, FreezeFailed, "cgroup.freeze: Permission denied"),
    ],
)
def test_why_it_could_not_be_told_to_is_said(
    unit: Unit,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    there: bool,
    kind: type[Exception],
    words: str,
) -> None:
    def fails(directory: str, value: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cgroup, "write_freeze", fails)
    if not there:
        (unit.engine / "cgroup.events").unlink()
        unit.engine.rmdir()
    for call in (unit.freezer.freeze, unit.freezer.thaw):
        with pytest.raises(kind, match=words):
            asyncio.run(call(unit.handle, 1.0))


# ---- killed for memory ---------------------------------------------------------------------------


def memory(directory: pathlib.Path, killed: object, hit: object, limit: str | None = None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.events").write_text(f"oom {hit}\noom_kill {killed}\n")
    if limit is not None:
        (directory / "memory.max").write_text(limit)


def test_ends_one_after_the_other_are_told_apart(tmp_path: pathlib.Path) -> None:
    """Only the counters of the slice are left when a cgroup is gone; each end is one of theirs."""
    memory(tmp_path / "s", 0, 0)
    oom = Oom(str(tmp_path), "s")
    for name in ("a", "b", "c"):
        memory(tmp_path / "s" / name, 0, 0, str(5 << 20))
        oom.watch(f"/s/{name}")
    memory(tmp_path / "s", 1, 1)
    memory(tmp_path / "s" / "a", 1, 1)
    limit = "it went past MemoryMax=5M of a.scope (limits.memory_max)"
    assert oom.cause("/s/a", "a.scope") == limit
    for path in (tmp_path / "s" / "b").iterdir():
        path.unlink()
    assert oom.cause("/s/b", "b.scope") is None
    memory(tmp_path / "s", 2, 1)
    assert oom.cause("/s/b", "b.scope") == "the host ran out of memory"
    (tmp_path / "s" / "memory.events").unlink()
    (tmp_path / "s" / "c" / "memory.events").write_text("not a number x\n")
    assert oom.cause("/s/c", "c.scope") is None
    memory(tmp_path / "s", 3, 2)
    assert oom.cause("/s/c", "c.scope") == "the host ran out of memory", "its limit is forgotten"
