"""Engines' output where it is rarely so: without a mark, adopted, cut, followed twice, let go."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from llmux.drivers.engine import output
from llmux.drivers.engine.line_rate import LINES, WINDOW_SECS
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.systemd.journal import Journal
from llmux.ports import UnitHandle

OWN = os.getpid()


def handle(ticks: int = 1, cgroup: str | None = "/c") -> UnitHandle:
    return UnitHandle("m", "llmux-m.scope", OWN, ticks, cgroup)


class Heard(Journal):
    def __init__(self, present: bool = True) -> None:
        super().__init__("/" if present else "/no/such")
        self.entries: list[dict[str, str]] = []
        self.takes = True

    def send(self, fields: Iterable[tuple[str, str]], pid: int | None = None) -> bool:
        if self.takes:
            self.entries.append(dict(fields))
        return self.takes


def say(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


Body = Callable[[EngineFiles, str], None]
Follow = Callable[..., list[str]]


@pytest.fixture
def follow(tmp_path: Path) -> Follow:
    """With files of a supervisor's own in one directory; the lines that it passed on."""
    tmp_path.chmod(0o700)

    def run(body: Body, journal: Journal | None = None) -> list[str]:
        seen: list[str] = []

        async def main() -> None:
            files = EngineFiles(
                str(tmp_path / "out"), journal=journal, on_line=lambda _, line: seen.append(line)
            )
            body(files, str(tmp_path / "out" / "m" / "stdout.log"))
            await files.close()
            await files.close()

        before = sorted(os.listdir("/proc/self/fd"))
        asyncio.run(main())
        assert sorted(os.listdir("/proc/self/fd")) == before
        return seen

    return run


def test_what_was_there_before_the_mark_is_no_new_engines(follow: Follow, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    (tmp_path / "out" / "m").mkdir(mode=0o700)

    def body(files: EngineFiles, path: str) -> None:
        say(path, "old\n")
        assert files.paths("m")[0] == path
        say(path, "new\n")
        files.attach(handle())
        assert files.tail("m") == ["new"]

    assert follow(body) == ["new"]


def test_both_files_and_their_marks_are_for_our_group_to_read(
    follow: Follow, tmp_path: Path
) -> None:
    def body(files: EngineFiles, path: str) -> None:
        files.paths("m")
        files.attach(handle())
        modes = {
            entry.name: stat.S_IMODE(entry.stat().st_mode)
            for entry in (tmp_path / "out" / "m").iterdir()
        }
        assert modes == dict.fromkeys(
            ("stdout.log", "stdout.log.offset", "stderr.log", "stderr.log.offset"), 0o640
        )
        files.detach("m")
        for file in (tmp_path / "out" / "m").iterdir():
            file.unlink()
        files.attach(handle())
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o640

    before = os.umask(0)
    try:
        follow(body)
    finally:
        os.umask(before)


def test_a_mark_that_is_none_hides_its_file_alone(
    follow: Follow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    (tmp_path / "out" / "m").mkdir(mode=0o700)
    (tmp_path / "out" / "m" / "stdout.log.offset").mkdir()

    def body(files: EngineFiles, path: str) -> None:
        files.paths("m")
        files.attach(handle())
        say(path, "unheard\n")
        say(path.replace("stdout", "stderr"), "heard\n")
        assert files.tail("m") == ["heard"]

    follow(body)
    assert "cannot follow" in caplog.text


def test_an_adopted_engine_keeps_its_own_lines_and_says_the_rest_once(follow: Follow) -> None:
    def first(files: EngineFiles, path: str) -> None:
        files.attach(handle(1))
        say(path, "older\n")
        files.tail("m")
        files.attach(handle(2))

    def silent(files: EngineFiles, path: str) -> None:
        files.attach(handle(2))
        assert files.tail("m") == [], "what the older one said is not its own"
        say(path, "own\n")
        files.tail("m")

    def second(files: EngineFiles, path: str) -> None:
        say(path, "meanwhile\n")
        files.attach(handle(2))
        assert files.tail("m") == ["own", "meanwhile"]
        os.truncate(path, 0)
        assert files.tail("m") == ["own", "meanwhile"]
        say(path, "cut\n")
        files.tail("m")

    def third(files: EngineFiles, path: str) -> None:
        files.attach(handle(2))
        assert files.tail("m") == ["cut"], "its begin was past the end: all of it"

    for body, said in ((first, ["older"]), (silent, ["own"]), (second, ["meanwhile", "cut"]),
                       (third, [])):  # fmt: skip
        assert follow(body) == said


def test_of_an_adopted_engine_the_last_64_kib_are_context(follow: Follow) -> None:
    lines = [f"{number:01023}" for number in range(100)]

    def first(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "".join(f"{line}\n" for line in lines))
        assert files.tail("m", 1000) == lines

    def second(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        assert files.tail("m", 1000) == lines[-64:]

    follow(first)
    follow(second)


def test_twenty_lines_are_shown_and_two_hundred_kept(follow: Follow) -> None:
    lines = [f"line {number}" for number in range(250)]

    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle(1))
        say(path, "".join(f"{line}\n" for line in lines))
        assert files.tail("m") == lines[-20:]
        assert files.tail("m", 1000) == lines[-200:]
        files.attach(handle(2))
        assert files.previous("m") == lines[-20:]
        assert files.tail("m", -1) == []

    assert follow(body) == lines


def test_a_line_of_16_kib_is_one_and_a_longer_one_is_two(follow: Follow) -> None:
    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "x" * (16 << 10) + "\n" + "y" * ((16 << 10) + 1) + "\n")
        files.tail("m")

    assert [len(line) for line in follow(body)] == [16 << 10, 16 << 10, 1]


def test_a_file_is_cut_past_16_mib(follow: Follow) -> None:
    def body(files: EngineFiles, path: str) -> None:
        files.paths("m")
        for size, kept in ((16 << 20, 16 << 20), ((16 << 20) + 1, 0)):
            with open(path, "w") as file:
                os.truncate(file.fileno(), size)
            Path(f"{path}.offset").write_text(f"{size:020d} {0:020d} {OWN}:1 0".ljust(110) + "\n")
            files.attach(handle())
            files.tail("m")
            files.detach("m")
            assert os.path.getsize(path) == kept

    follow(body)


def test_a_disk_with_less_than_64_kib_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, short in ((65536, False), (65535, True)):
        monkeypatch.setattr(output, "disk_space", lambda path, free=free: (1 << 40, free))
        said = EngineFiles(str(tmp_path)).shortage()
        assert (said is not None and f"the disk of {tmp_path} is full" in said) is short


def test_what_is_not_followed_is_not_watched(follow: Follow) -> None:
    def watches() -> int:
        return sum(
            Path(f"/proc/self/fdinfo/{fd}").read_text().count("inotify wd:")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fdinfo/{fd}")
        )

    def body(files: EngineFiles, path: str) -> None:
        for _ in range(2):
            files.attach(handle())
            assert watches() == before + 2
        files.detach("m")
        assert watches() == before

    before = watches()
    follow(body)


def test_what_follows_again_after_a_close_sees_lines(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    async def main() -> None:
        told = asyncio.Event()
        files = EngineFiles(str(tmp_path / "out"), on_line=lambda *_: told.set())
        files.attach(handle())
        await files.close()
        files.attach(handle())
        say(files.paths("m")[0], "line\n")
        async with asyncio.timeout(30):
            await told.wait()
        await files.close()

    asyncio.run(main())


def test_a_bar_that_nobody_wants_to_see_is_none(follow: Follow) -> None:
    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "10%\r20%")
        assert files.tail("m") == ["20%"]

    assert follow(body) == ["20%"]


def test_the_journals_socket_is_closed_at_the_end(follow: Follow, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "j"))
        receiver.settimeout(30)

        def body(files: EngineFiles, path: str) -> None:
            files.attach(handle())
            say(path, "line\n")
            files.tail("m")
            assert b"MESSAGE=line\n" in receiver.recv(4096)

        follow(body, Journal(str(tmp_path / "j")))


@pytest.mark.parametrize("present", [True, False])
def test_where_there_is_no_journal_lines_are_logged(
    follow: Follow, caplog: pytest.LogCaptureFixture, present: bool
) -> None:
    caplog.set_level("DEBUG", "llmux.engine")
    journal = Heard(present)

    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "line\n")
        files.tail("m")

    follow(body, journal)
    assert ("line" in caplog.text) is not present
    assert [entry["SYSLOG_IDENTIFIER"] for entry in journal.entries] == ["vllm:m"] * present
    assert "does not keep up" not in caplog.text


def test_the_first_line_that_the_journal_drops_is_said(
    follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Heard):
        def send(self, fields: Iterable[tuple[str, str]], pid: int | None = None) -> bool:
            self.dropped += 1
            return False

    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        for count in (1, 2):
            say(path, "line\n")
            files.tail("m")
            assert files.dropped == count
            assert caplog.text.count("lines of llmux-m.scope are dropped there") == 1

    follow(body, Full())


def test_how_many_lines_the_journal_did_not_get_is_asked_once_in_a_while(follow: Follow) -> None:
    journal = Heard()

    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "x\n" * (LINES + 2))
        files.tail("m")
        loop = asyncio.get_running_loop()
        report = files._models["m"].report
        assert report is not None
        assert loop.time() + 0.5 * WINDOW_SECS < report.when() <= loop.time() + WINDOW_SECS
        say(path, "x\n")
        files.tail("m")
        assert files._models["m"].report is report, "one is enough"
        journal.takes = False
        files._report_left_out(files._models["m"], handle())
        again = files._models["m"].report
        assert report.cancelled()
        assert again is not None and again.when() <= loop.time() + 1
        journal.takes = True

    follow(body, journal)
    assert len(journal.entries) == LINES + 1
    assert journal.entries[-1]["MESSAGE"].startswith("3 lines left out; ")


def test_the_begin_of_a_line_goes_with_the_rest_that_is_left_out(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MOST_BEHIND", 20)
    monkeypatch.setattr(output, "CHUNK", 20)

    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "1234567")
        assert files.tail("m") == ["1234567"]
        say(path, "89\nab\ncd\nef\ngh\nij\nkl\nmn\nop\nqr\n")
        assert files.tail("m") == ["kl", "mn", "op", "qr"]
        assert int(Path(f"{path}.offset").read_text().split()[0]) == os.path.getsize(path)

    follow(body)


def test_a_line_that_goes_on_past_the_last_turn_is_whole(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where just one more chunk is behind, nothing is left out."""
    for name, value in (("MOST_LINES", 2), ("MOST_TURNS", 3), ("CHUNK", 8)):
        monkeypatch.setattr(output, name, value)

    def body(files: EngineFiles, path: str) -> None:
        files.attach(handle())
        say(path, "a\n" * 6 + "x" * 8 + "y" * 7 + "\n")
        files.tail("m")
        say(path, "a\n" * 6 + "x" * 8 + "y\n" * 4)
        files.tail("m")
        # One byte more: a whole line goes.
        say(path, "a\n" * 6 + "x" * 8 + "y\n" * 4 + "\n")
        files.tail("m")

    assert follow(body) == [
        *"aaaaaa", "x" * 8 + "y" * 7,
        *"aaaaaa", "x" * 8 + "y", *"yyy",
        *"aaaaaa", *"yyy",
    ]  # fmt: skip
