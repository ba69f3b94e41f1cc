"""What an engine wrote and what it was made of: files, passed on, read back and compared."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from llmux.config.schema import ModelConfig
from llmux.drivers.engine import identity, output
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.engine.output_marks import read_mark, read_part, write_mark
from llmux.drivers.images.identity import Shown
from llmux.drivers.processes.process import start_ticks
from llmux.drivers.systemd.journal import Journal
from llmux.errors import DriverError
from llmux.ports import EngineUser, LaunchSpec, UnitHandle

HANDLE = UnitHandle("m", "llmux-m.scope", os.getpid(), start_ticks(os.getpid()) or 1, "/c")


class Heard(Journal):
    """A journal that takes what it is told to take."""

    def __init__(self) -> None:
        super().__init__("/")  # is there
        self.takes = True
        self.entries: list[tuple[dict[str, str], int | None]] = []

    def send(self, fields: Iterable[tuple[str, str]], pid: int | None = None) -> bool:
        if not self.takes:
            self.dropped += 1
            return False
        self.entries.append((dict(fields), pid))
        return True

    def lines(self) -> list[str]:
        return [entry["MESSAGE"] for entry, _ in self.entries]


def say(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def following(place: Path, body: Callable[[EngineFiles, Heard, str, str], None]) -> None:
    async def main() -> None:
        heard = Heard()
        files = EngineFiles(str(place / "out"), journal=heard)
        body(files, heard, *files.paths("m"))
        await files.close()

    place.chmod(0o700)
    asyncio.run(main())


def test_each_line_is_an_entry_of_its_unit(tmp_path: Path) -> None:
    def body(files: EngineFiles, heard: Heard, out: str, err: str) -> None:
        seen: list[tuple[str, str]] = []
        files.on_line = lambda model, line: seen.append((model, line))
        say(out, "INFO one\n")
        files.attach(HANDLE)
        assert seen == [("m", "INFO one")], "what it said before"
        say(err, "ERROR two\nhalf")
        assert files.tail("m") == ["INFO one", "ERROR two", "half"]
        assert files.tail("m", 2) == ["ERROR two", "half"]
        assert files.tail("m", 0) == []
        assert seen == [("m", "INFO one"), ("m", "ERROR two")]
        fields = {
            "SYSLOG_IDENTIFIER": "llmux-m", "SYSLOG_PID": str(HANDLE.pid),
            "OBJECT_PID": str(HANDLE.pid), "OBJECT_SYSTEMD_UNIT": "llmux-m.scope",
            "LLMUX_MODEL": "m", "LLMUX_UNIT": "llmux-m.scope",
        }  # fmt: skip
        said = [("INFO one", "6"), ("ERROR two", "3")]
        found = [(entry["MESSAGE"], entry["PRIORITY"]) for entry, _ in heard.entries]
        assert found == said
        for entry, pid in heard.entries:
            assert pid == HANDLE.pid
            rest = {k: v for k, v in entry.items() if k not in ("MESSAGE", "PRIORITY")}
            assert rest == {**fields, "SYSLOG_IDENTIFIER": rest["SYSLOG_IDENTIFIER"]}
        files.detach("m")
        files.detach("m")
        files.detach("another")
        assert heard.lines()[-1] == "half", "a line without an end is one at the end"
        assert files.tail("m") == ["INFO one", "ERROR two", "half"]
        say(out, "later\n")
        files.attach(HANDLE)
        assert "later" in files.tail("m")
        assert heard.lines().count("half") == 1

    following(tmp_path, body)


def test_without_a_cgroup_or_a_journal_lines_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "llmux.engine")

    def body(files: EngineFiles, heard: Heard, out: str, err: str) -> None:
        files.attach(UnitHandle("m", "m", HANDLE.pid, HANDLE.start_ticks))
        say(out, "said here\n")
        files.tail("m")
        assert heard.entries == []
        assert "said here" in caplog.text

    following(tmp_path, body)


def test_a_file_that_cannot_be_followed_hides_not_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body(files: EngineFiles, heard: Heard, out: str, err: str) -> None:
        os.mkdir(out)
        files.attach(HANDLE)
        say(err, "said\n")
        assert files.tail("m") == ["said"]
        assert f"cannot follow {out}" in caplog.text
        os.rmdir(out)

    following(tmp_path, body)


def test_what_the_journal_does_not_take_is_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmux.drivers.engine.line_rate.LINES", 2)

    def body(files: EngineFiles, heard: Heard, out: str, err: str) -> None:
        heard.takes = False
        files.attach(HANDLE)
        say(out, "a\nb\nc\nd\n")
        files.tail("m")
        assert files.dropped == 2
        assert caplog.text.count("the journal does not keep up") == 1
        model = files._models["m"]
        assert (model.rate.left_out, model.report is not None) == (2, True)
        files._report_left_out(model, HANDLE)
        assert (model.rate.left_out, model.report is not None) == (2, True), "asked again later"
        heard.takes = True
        files._report_left_out(model, HANDLE)
        assert (model.rate.left_out, model.report) == (0, None)
        (entry,) = heard.entries
        assert entry[0]["MESSAGE"] == "2 lines left out; `llmux logs m` has the last ones"
        assert entry[0]["PRIORITY"] == "4"
        files._report_left_out(model, HANDLE)
        assert len(heard.entries) == 1
        say(out, "e\n")
        files.tail("m")
        files.detach("m")
        assert heard.lines()[-1].startswith("1 lines left out")
        assert model.report is None

    following(tmp_path, body)


def test_only_where_it_is_root_s_alone_is_output_kept(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    files = EngineFiles(str(tmp_path / "out"))
    files.paths("m")
    (tmp_path / "out" / "m").chmod(0o777)
    with pytest.raises(DriverError, match='cannot open the output of model "m"') as raised:
        files.paths("m")
    assert "closed to all others" in (raised.value.hint or "")
    assert files.tail("m") == files.previous("m") == []


def test_a_disk_is_short_below_64_kib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, short in ((output.LEAST_ROOM, False), (output.LEAST_ROOM - 1, True)):
        monkeypatch.setattr(output, "disk_space", lambda path, free=free: (1 << 40, free))
        assert (EngineFiles(str(tmp_path)).shortage() is not None) is short
    monkeypatch.undo()
    assert EngineFiles(str(tmp_path / "none")).shortage() is None


def test_what_both_files_of_a_former_engine_say_is_read_back(tmp_path: Path) -> None:
    def body(files: EngineFiles, heard: Heard, out: str, err: str) -> None:
        for number in (1, 2):
            files.attach(UnitHandle("m", "u", 7, number, "/c"))
            say(out, f"out {number}\n")
            say(err, f"err {number}\n")
            files.detach("m")
        other = EngineFiles(str(tmp_path / "out"))
        assert other.tail("m") == ["out 2", "err 2"]
        assert other.previous("m") == ["out 1", "err 1"]
        assert other.previous("m", 1) == ["err 1"]
        os.unlink(out)
        assert other.tail("m") == ["err 2"]
        assert other.tail("nobody") == other.previous("nobody") == []

    following(tmp_path, body)


@pytest.mark.parametrize(
    ("data", "size", "mark"),
    [
        (b"5 3 7:1 2", 9, (5, 3, "7:1", 2)),
        (b"5 3 7:1", 9, (5, 3, "7:1", 3)),
        (b"9 3 - 0", 9, (9, 3, "-", 0)),
        (b"10 3 x 2", 9, (0, 3, "x", 2)),
        (b"5 3", 9, (9, 9, "-", 9)),
        (b"", 9, (9, 9, "-", 9)),
        (b"a 3 x 2", 9, (9, 9, "-", 9)),
        (b"5 3 x b", 9, (9, 9, "-", 9)),
        (b"5 3 \xff 2", 9, (9, 9, "-", 9)),
        (b"-1 3 x 2", 9, (9, 9, "-", 9)),
        (b"5 3 x -2", 9, (9, 9, "-", 9)),
        (b"0 0 x 0", 9, (0, 0, "x", 0)),
        (write_mark(5, 3, "7:1", 2).encode(), 9, (5, 3, "7:1", 2)),
        (write_mark(5, 3, None, 2).encode(), 9, (5, 3, "-", 2)),
    ],
)
def test_how_far_output_was_passed_on(
    data: bytes, size: int, mark: tuple[int, int, str, int]
) -> None:
    assert read_mark(data, size) == mark
    assert len(write_mark(1, 2, "x", 3)) == len(write_mark(10**15, 2, None, 3)) == 111


@pytest.mark.parametrize(
    ("part", "lines"),
    [
        ((0, 6), ["one", "tw"]),
        ((4, 8), ["two"]),
        ((-3, 4), ["one"]),
        ((4, 99), ["two", "three"]),
        ((6, 4), []),
        ((99, 99), []),
    ],
)
def test_a_part_of_a_file_is_bounded_by_it(
    tmp_path: Path, part: tuple[int, int], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "f").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "f.offset").write_text(write_mark(8, 4, "x", 1))
    asked: list[tuple[int, int, int]] = []

    def choose(*facts: int) -> tuple[int, int]:
        asked.append(facts)  # type: ignore[arg-type]
        return part

    opened = os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    try:
        assert read_part(opened, "f", choose) == lines
        assert asked == [(4, 1, 15)]
        monkeypatch.setattr("llmux.drivers.engine.output_marks.BACKLOG", 6)
        assert read_part(opened, "f", lambda *_: (0, 15)) == ["three"]
        with pytest.raises(FileNotFoundError):
            read_part(opened, "g", choose)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(opened)


# ---- what it was made of -------------------------------------------------------------------------


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    root = tmp_path / "venv"
    site = root / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    (root / "bin").mkdir()
    for name in ("Torch-2.9.0", "vllm-0.32", "other-1", "bad"):
        (site / f"{name}.dist-info").mkdir()
    (site / "vllm-9.egg-info").mkdir()
    (root / "bin" / "python3").write_text("binary")
    (root / "bin" / "vllm").write_text(f"#!{root}/bin/python3 -s\n")
    (root / "bin" / "vllm").chmod(0o755)
    return root


@pytest.mark.parametrize(
    ("first", "python"),
    [
        ("#!{}/bin/python3 -s", True),
        ("#! {}/bin/python3", True),
        ("#!/usr/bin/env python3", False),
        ("#!/bin/sh", False),
        ("#!", False),
        ("\x7fELF", False),
    ],
)
def test_a_program_is_known_with_its_interpreter_and_libraries(
    venv: Path, first: str, python: bool
) -> None:
    script = venv / "bin" / "vllm"
    script.write_text(first.format(venv) + "\n")
    shown = Shown(stamp=lambda path: f"stamp of {os.path.basename(path)}")
    for program in ("vllm", str(script)):
        found = identity.program_identity(program, str(venv / "bin"), {"torch", "vllm"}, shown)
        assert found.pop("program") == f"{os.path.realpath(script)}, stamp of vllm"
        real = os.path.realpath(venv / "bin" / "python3")
        assert found == (
            {"python": f"{real}, stamp of python3", "version.torch": "2.9.0",
             "version.vllm": "0.32"} if python else {}
        )  # fmt: skip
    gone = identity.program_identity("nothing", str(venv / "bin"), set())
    assert gone == {"program": "nothing (not found)"}
    unseen = identity.program_identity("vllm", str(venv / "bin"), (), Shown(stamp=lambda _: None))
    assert unseen["program"].endswith(", unreadable")


def test_the_driver_and_each_gpu_are_named(tmp_path: Path) -> None:
    assert identity.driver_identity(tmp_path) == {}
    (tmp_path / "version").write_text("NVRM 1\nGCC\n")
    for name in ("0000:01", "0000:02"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
        text = f"Model: \t H200 {name}\nIRQ: 5\nGPU UUID: \t GPU-{name}\n"
        (tmp_path / "gpus" / name / "information").write_text(text)
    assert identity.driver_identity(tmp_path) == {
        "nvidia_driver": "NVRM 1",
        "gpu.0000:01.Model": "H200 0000:01", "gpu.0000:01.GPU UUID": "GPU-0000:01",
        "gpu.0000:02.Model": "H200 0000:02", "gpu.0000:02.GPU UUID": "GPU-0000:02",
    }  # fmt: skip


def test_of_another_host_boot_times_and_the_users_name_do_not_count(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(venv / "bin"))  # ours is not the engine's
    user = EngineUser("llmux-7", 70, 71, "/h", (9, 5))
    env = {"PATH": str(venv / "bin"), "HF_TOKEN": "x"}
    spec = LaunchSpec("m", ("vllm", "serve"), env, user, "/o", "/e", "/r")
    config = ModelConfig("m", str(venv))
    here = dict(identity.engine_identity(config, spec))
    assert here["user"] == "llmux-7 (uid 70, gid 71, groups 5, 9)"
    assert "boot_id" in here and "version.vllm" in here
    away = identity.portable_identity(config, spec, "ab" * 16)
    assert (away["uid"], away["gid"], away["groups"]) == ("70", "71", "5 9")
    assert "boot_id" not in away
    content = hashlib.sha256((venv / "bin" / "vllm").read_bytes()).hexdigest()[:32]
    assert content in away["program"] and content not in here["program"]
    assert away["env.HF_TOKEN"] == Shown.portable(b"\xab" * 16).hide("x") != here["env.HF_TOKEN"]
    root = LaunchSpec("m", ("vllm",), {}, None, "/o", "/e", "/r")
    assert identity.engine_identity(config, root)["user"] == "root"
    assert identity.engine_identity(config, root)["program"] == "vllm (not found)"
    found = identity.portable_identity(config, root, "ab" * 16)
    groups = sorted(os.getgrouplist("root", 0))
    assert (found["uid"], found["groups"]) == ("0", " ".join(map(str, groups)))


@pytest.mark.parametrize("own", [True, False])
def test_what_is_far_behind_is_left_out_and_counted_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Whole lines of it; without a journal nobody is told."""
    monkeypatch.setattr(output, "MOST_BEHIND", 100)
    monkeypatch.setattr(output, "CHUNK", 60)

    def body(files: EngineFiles, heard: Heard, out: str, err: str) -> None:
        files.attach(HANDLE if own else UnitHandle("m", "m", HANDLE.pid, HANDLE.start_ticks))
        say(out, "".join(f"line {number:04}\n" for number in range(20)))
        assert files.tail("m")[-1] == "line 0019"
        model = files._models["m"]
        left = 20 - len(files.tail("m"))
        assert left >= 6
        assert files.tail("m") == [f"line {number:04}" for number in range(left, 20)]
        assert (model.rate.left_out, model.report is not None) == (
            (left, True) if own else (0, False)
        )

    following(tmp_path, body)
