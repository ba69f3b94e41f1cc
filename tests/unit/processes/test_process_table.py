"""Processes as the kernel shows them, and who is told of an end."""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import pathlib
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llmux.drivers.processes import cgroup, launcher, process
from llmux.drivers.processes.process import Process, Watches
from llmux.ports import UnitHandle

NOBODY = 2**22 + 1
SECONDS = 20.0


@contextmanager
def cat(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its input ends."""
    pipe = subprocess.PIPE
    with subprocess.Popen(argv or ["cat"], stdin=pipe, stdout=pipe) as child:
        yield child


# ---- what /proc says -----------------------------------------------------------------------------


def test_a_name_with_spaces_and_parentheses_hides_no_field(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/cat")
    with cat(str(program)) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"x")
        child.stdin.flush()
        assert child.stdout.read(1) == b"x"
        stat = process.read_stat(child.pid)
        assert stat is not None
        assert (stat[0], stat[1]) == (os.getpid(), process.start_ticks(child.pid))
        assert stat[2] in "SR"
        assert cgroup.process_state(child.pid) in "SR"
        mine = process.start_ticks(os.getpid())
        assert mine is not None and stat[1] > mine
        assert process.descendants(os.getpid()).count(child.pid) == 1
        assert child.pid in process.descendants(os.getppid())
        assert process.find_root([child.pid, os.getpid()]) == os.getpid()
        assert process.find_root([child.pid, NOBODY]) == child.pid
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert cgroup.process_state(child.pid) == "Z"
        assert process.find_root([child.pid]) is None
        assert child.pid not in process.descendants(os.getpid())
    assert process.read_stat(child.pid) is None
    assert cgroup.process_state(child.pid) == "X"


def test_what_several_processes_use_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with cat() as child:
        me = [os.getpid()]
        assert process.memory_bytes([child.pid, *me]) >= process.memory_bytes([child.pid]) > 0
        # what is Python's own heap and no file
        assert 2 << 20 < process.memory_bytes(me) < 4 << 30
        assert process.memory_bytes([NOBODY, child.pid]) > 0
    assert process.memory_bytes([NOBODY]) == 0
    assert process.cpu_seconds([NOBODY]) == 0
    used = os.times()
    found = process.cpu_seconds([NOBODY, *me])
    later = os.times()
    assert used.user + used.system - 1e-6 <= found <= later.user + later.system + 1e-6


def proc(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """These files below /proc, by their name there, and no others."""

    def opened(path: str, mode: str = "r") -> io.StringIO | io.BytesIO:
        if (text := files.get(path.removeprefix("/proc/"))) is None:
            raise FileNotFoundError(path)
        return io.BytesIO(text.encode()) if "b" in mode else io.StringIO(text)

    real = os.listdir
    names = [*dict.fromkeys(name.partition("/")[0] for name in files), "self", str(NOBODY)]
    monkeypatch.setattr(os, "listdir", lambda path: names if path == "/proc" else real(path))
    monkeypatch.setattr(builtins, "open", opened)


def stat(parent: int, ticks: int, state: str = "S", user: int = 0, system: int = 0) -> str:
    return f"7 (n) {state} {parent} 0 0 0 0 0 0 0 0 0 {user} {system} 0 0 0 0 0 0 {ticks} 0 0\n"


def test_what_a_damaged_file_says_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    whole = stat(1, 5, user=3 * ticks, system=ticks)
    with monkeypatch.context() as patched:
        files = {
            "7/stat": "", "8/stat": whole.replace(f" {ticks} ", " x "), "9/stat": whole,
            "7/status": "RssAnon:\n", "8/status": "RssAnon: x kB\n",
            "9/status": "Name: n\nRssAnon: 3 kB\nRssFile: 7 kB\nRssShmem:\t 5 kB\n",
        }  # fmt: skip
        proc(patched, files)
        found = process.cpu_seconds([7, 8, 9, NOBODY]), process.memory_bytes([7, 8, 9, NOBODY])
    assert found == (4.0, 8192)


@pytest.mark.parametrize(
    ("stats", "root"),
    [
        ({"7": stat(1, 5), "8": stat(1, 4), "9": stat(8, 3)}, 8),  # the oldest without a parent
        ({"7": stat(1, 5), "8": stat(1, 5)}, 7),
        ({"7": stat(8, 5), "8": stat(7, 4)}, 8),  # a circle, as when pids were used again
        ({"7": stat(1, 5, "Z"), "8": stat(7, 6), "9": stat(1, 7, "X")}, 8),
        ({"7": stat(1, 5, "Z")}, None),
    ],
)
def test_the_root_of_a_tree_is_its_oldest_orphan(
    monkeypatch: pytest.MonkeyPatch, stats: dict[str, str], root: int | None
) -> None:
    with monkeypatch.context() as patched:
        proc(patched, {f"{pid}/stat": text for pid, text in stats.items()})
        found = process.find_root([9, 8, 7, NOBODY])
    assert found == root


def test_descendants_are_found_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"7": 1, "8": 7, "9": 8, "10": 7, "11": 1, "12": 11}
    files = {f"{pid}/stat": stat(parent, 1) for pid, parent in tree.items()}
    files["13/stat"] = stat(9, 1, "Z")
    with monkeypatch.context() as patched:
        proc(patched, files)
        found = process.descendants(7), launcher._descendants(7), process.descendants(12)
    assert sorted(found[0]) == [8, 9, 10]
    assert sorted(found[1]) == [8, 9, 10, 13], "whose end it waits for, too"
    assert found[2] == []


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (os.CLD_EXITED, 3, "exit status 3"),
        (os.CLD_KILLED, 9, "killed by SIGKILL"),
        (os.CLD_KILLED, 40, "killed by signal 40"),
        (os.CLD_DUMPED, 11, "killed by SIGSEGV (core dumped)"),
    ],
)
def test_an_end_in_words(code: int, status: int, words: str) -> None:
    assert process.describe_status(code, status) == words


class Watched:
    def __init__(self) -> None:
        self.told: list[tuple[UnitHandle, str]] = []

    def __call__(self, handle: UnitHandle, description: str) -> None:
        self.told.append((handle, description))


def handle_of(pid: int, ticks: int, unit: str = "u") -> UnitHandle:
    return UnitHandle("m", unit, pid, ticks)


def test_each_watch_is_told_once_and_none_that_was_given_up() -> None:
    watches, first, second = Watches(), Watched(), Watched()
    one, two = handle_of(7, 1), handle_of(7, 2)
    watches.add(one, first)
    watches.add(two, second)
    watches.report((7, 2), "gone")
    watches.report((7, 2), "gone again")
    watches.report((8, 1), "nobody's")
    assert (first.told, second.told) == ([], [(two, "gone")])
    watches.remove(one)
    watches.remove(one)
    watches.report((7, 1), "x")
    watches.add(one, first)
    watches.clear()
    watches.report((7, 1), "x")
    assert first.told == []


# ---- a process that is held ----------------------------------------------------------------------


def test_a_process_is_held_by_what_names_it_for_ever() -> None:
    async def body() -> None:
        with cat() as child:
            ticks = process.start_ticks(child.pid)
            assert ticks is not None
            before = len(os.listdir("/proc/self/fd"))
            assert Process.open(child.pid, ticks + 1) is None
            assert Process.open(NOBODY) is None
            assert len(os.listdir("/proc/self/fd")) == before
            held = Process.open(child.pid, ticks)
            assert held is not None
            assert (held.pid, held.ticks, held.ended, held.code) == (child.pid, ticks, None, None)
            assert not await held.wait(0.001)
            told: list[str | None] = []
            held.on_end(lambda ended: told.append(ended.ended))
            assert held.signal(0)
            assert held.signal(signal.SIGTERM)
            assert await held.wait(SECONDS)
            assert (held.ended, held.code) == ("killed by SIGTERM", -15)
            assert told == ["killed by SIGTERM"]
            held.on_end(lambda ended: told.append("late"))
            assert told == ["killed by SIGTERM"], "never from within the call"
            await asyncio.sleep(0)
            assert told == ["killed by SIGTERM", "late"]
            assert not held.signal(signal.SIGTERM)
            assert await held.wait(SECONDS)
            assert len(os.listdir("/proc/self/fd")) == before
            child.returncode = -15  # it is reaped

    asyncio.run(body())


@pytest.mark.parametrize("code", [0, 3])
def test_how_a_child_ended_is_told_to_all_who_wait(code: int) -> None:
    async def body() -> None:
        with cat("sh", "-c", f"read x; exit {code}") as child:
            held = Process.open(child.pid)
            assert held is not None
            waiting = [asyncio.ensure_future(held.wait(SECONDS)) for _ in range(3)]
            await asyncio.sleep(0)
            assert child.stdin is not None
            child.stdin.close()
            assert await asyncio.gather(*waiting) == [True] * 3
            assert (held.ended, held.code) == (f"exit status {code}", code)
            child.returncode = code

    asyncio.run(body())


def test_of_what_is_no_child_only_its_end_is_known() -> None:
    async def body() -> None:
        script = "sleep 1000 & echo $!; read x; kill $!; wait $!; read x"
        with cat("sh", "-c", script) as parent:
            assert parent.stdin is not None and parent.stdout is not None
            held = Process.open(int(parent.stdout.readline()))
            assert held is not None
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            assert await held.wait(SECONDS)
            assert (held.ended, held.code) == ("gone", None)
            parent.stdin.close()

    asyncio.run(body())


def test_who_stops_looking_leaves_the_process_alone() -> None:
    async def body() -> None:
        with cat() as child:
            held = Process.open(child.pid)
            assert held is not None
            told: list[Process] = []
            held.on_end(told.append)
            for _ in range(2):
                held.close()
            assert not held.signal(signal.SIGKILL)
            assert child.poll() is None
            child.kill()
            child.wait()
            assert not await held.wait(0.001)
            assert told == []

    asyncio.run(body())


def test_one_that_goes_while_it_is_opened_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there for pidfd_open(2), and is not when its start is asked for."""

    async def body() -> None:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(os, "pidfd_open", lambda pid: os.open("/dev/null", os.O_RDONLY))
        assert Process.open(NOBODY) is None
        assert Process.open(NOBODY, 5) is None
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(body())


def test_who_gave_up_waiting_is_forgotten_and_so_is_what_was_closed() -> None:
    async def body() -> None:
        with cat() as child:
            held = Process.open(child.pid)
            assert held is not None
            for _ in range(3):
                assert not await held.wait(0.0)
            assert held._callbacks == []
            pidfd = held._pidfd
            held.close()
            assert not asyncio.get_running_loop().remove_reader(pidfd)

    asyncio.run(body())


def test_who_was_reaped_by_another_takes_no_signal() -> None:
    async def body() -> None:
        with cat() as child:
            held = Process.open(child.pid)
            assert held is not None
            child.kill()
            child.wait()
            assert not held.signal(signal.SIGTERM)
            assert await held.wait(SECONDS)
            assert (held.ended, held.code) == ("gone", None)

    asyncio.run(body())


def test_a_child_that_its_tracer_still_holds_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pidfd is readable, and there is nothing to reap yet."""
    asked: list[int] = []
    reap = os.waitid

    def waitid(*words: int) -> os.waitid_result | None:
        asked.append(words[0])
        return None if len(asked) < 3 else reap(*words)

    async def body() -> None:
        wrong: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: wrong.append(what))
        with cat() as child:
            held = Process.open(child.pid)
            assert held is not None
            monkeypatch.setattr(os, "waitid", waitid)
            child.kill()
            assert await held.wait(SECONDS)
            assert (held.ended, len(asked)) == ("killed by SIGKILL", 3)
            assert wrong == []
            child.returncode = -9

    asyncio.run(body())
