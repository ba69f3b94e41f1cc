"""How much of an engine's output is read, kept and cut, at each bound and one byte past it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmux.drivers.engine import output
from llmux.drivers.engine.output import EngineFiles
from llmux.ports import UnitHandle

HANDLE = UnitHandle("m", "m", os.getpid(), 1)


class Followed:
    """One model's stdout, its lines as they are passed on, and where its mark says they ended."""

    def __init__(self, files: EngineFiles) -> None:
        self.files = files
        self.seen: list[str] = []
        self.progress: list[tuple[str, str]] = []
        files.on_line = lambda _, line: self.seen.append(line)
        files.on_progress = lambda model, text: self.progress.append((model, text))
        self.path = Path(files.paths("m")[0])
        files.attach(HANDLE)

    def say(self, text: str) -> list[str]:
        """What was passed on of it."""
        with self.path.open("a") as file:
            file.write(text)
        return self.look()

    def look(self) -> list[str]:
        self.seen.clear()
        self.files.tail("m")
        return list(self.seen)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def offset(self) -> int:
        return int(Path(f"{self.path}.offset").read_text().split()[0])


@pytest.fixture
def follow(tmp_path: Path) -> Callable[[Callable[[Followed], None]], None]:
    tmp_path.chmod(0o700)

    def run(body: Callable[[Followed], None]) -> None:
        async def main() -> None:
            files = EngineFiles(str(tmp_path / "out"), max_file=10)
            body(Followed(files))
            await files.close()

        before = len(os.listdir("/proc/self/fd"))
        asyncio.run(main())
        assert len(os.listdir("/proc/self/fd")) == before

    return run


Follow = Callable[[Callable[[Followed], None]], None]


def test_a_file_is_cut_past_its_bound_once_all_of_it_is_passed_on(follow: Follow) -> None:
    def body(out: Followed) -> None:
        assert out.say("123456789\n") == ["123456789"]
        assert (out.size, out.offset) == (10, 10)
        assert out.say("\n") == [], "an empty line is none"
        assert (out.size, out.offset) == (0, 0)
        assert out.say("next\n") == ["next"]
        assert (out.size, out.offset) == (5, 5)

    follow(body)


def test_a_line_without_an_end_is_cut_past_twice_the_bound(follow: Follow) -> None:
    def body(out: Followed) -> None:
        assert out.say("one\n" + "x" * 16) == ["one"]
        assert (out.size, out.offset) == (20, 4)
        assert out.files.tail("m") == ["one", "x" * 16]
        assert out.say("x") == []
        assert (out.size, out.offset) == (0, 0)
        assert out.files.tail("m") == ["one"], "it is lost"
        assert out.say("next\n") == ["next"]

    follow(body)


@pytest.mark.parametrize("left", ["", "b\n", "b\nrest"])
def test_what_another_program_cut_is_read_from_its_begin(follow: Follow, left: str) -> None:
    def body(out: Followed) -> None:
        out.say("first\nhalf")
        out.path.write_text(left)
        assert out.look() == (["b"] if left else [])
        assert (out.size, out.offset) == (len(left), 2 if left else 0)
        assert out.say("\nc\n") == ["rest", "c"] if left.endswith("rest") else ["c"]

    follow(body)


def test_what_is_just_not_too_far_behind_is_all_passed_on(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "CHUNK", 6)
    monkeypatch.setattr(output, "MOST_BEHIND", 12)

    def body(out: Followed) -> None:
        out.files._max_file = 1000
        assert out.say("a\nb\nc\nd\ne\nf\n") == ["a", "b", "c", "d", "e", "f"]
        assert out.say("a\nb\nc\nd\ne\nlong\n") == ["d", "e", "long"]
        assert out.say("a\nb") == ["a"]
        assert out.say("\n\nd\ne\nf\ng\n") == ["b", "d", "e", "f", "g"]
        assert out.size == out.offset
        # Not one end in what is skipped: the rest of that line counts as one.
        assert out.say("x" * 15 + "\nd\n") == ["xxxxxxxxx", "d"]

    follow(body)


def test_very_many_short_lines_are_passed_on_some_at_a_time(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MOST_LINES", 2)

    def body(out: Followed) -> None:
        out.files._max_file = 1000
        assert out.say("a\nb\n") == ["a", "b"]
        assert out.say("c\nd\ne\nf\ng") == ["c", "d", "e", "f"]
        assert (out.offset, out.size) == (12, 13)
        assert out.say("\n\n\n\nh\n") == ["g", "h"]
        (model,) = out.files._models.values()
        out.path.write_text("1\n2\n3\n4\n5\n")
        model.files[0].offset = 0
        assert [out.files._read(model, model.files[0]) for _ in range(4)] == [
            True,
            True,
            True,
            False,
        ]
        assert out.seen[-5:] == ["1", "2", "3", "4", "5"]

    follow(body)


def test_the_last_of_more_short_lines_than_there_is_time_for(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MOST_LINES", 2), ("MOST_TURNS", 3), ("CHUNK", 8)):
        monkeypatch.setattr(output, name, value)

    def body(out: Followed) -> None:
        out.files._max_file = 1000
        first = [*"abcdefgh"]  # four turns of two lines
        assert out.say("".join(f"{line}\n" for line in first)) == first
        seen = out.say("".join(f"{line}\n" for line in range(100, 200)))
        assert seen == ["100", "101", "102", "103", "104", "105", "106", "107", "198", "199"]
        assert out.offset == out.size

    follow(body)


def test_a_line_longer_than_the_bound_is_passed_on_in_pieces(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MAX_LINE", 4)

    def body(out: Followed) -> None:
        out.files._max_file = 1000
        assert out.say("abcd") == []
        assert out.say("e") == ["abcd", "e"]
        assert out.offset == 5
        assert out.say("f\n") == ["f"]
        assert out.say("12345678\n") == ["1234", "5678"]

    follow(body)


def test_a_bar_that_moves_on_a_line_without_an_end_is_told(follow: Follow) -> None:
    def body(out: Followed) -> None:
        out.files._max_file = 1000
        for text, told in (
            ("plain", None),
            ("\n10%\r20%", "20%"),
            ("\r30%", "30%"),
            ("\n\rdone\nplain", None),
        ):
            out.progress.clear()
            out.say(text)
            assert [(model, said[-3:]) for model, said in out.progress] == (
                [("m", told)] if told else []
            )

    follow(body)


def test_what_was_passed_on_at_the_end_is_not_passed_on_again(follow: Follow) -> None:
    def body(out: Followed) -> None:
        assert out.say("one\nhalf") == ["one"]
        assert out.offset == 4
        out.files.detach("m")
        assert (out.seen[-1], out.offset) == ("half", 8)
        out.say(" later\n")
        out.files.attach(HANDLE)
        assert out.seen[-1] == " later"

    follow(body)


def test_of_the_engine_before_no_line_is_in_the_next_ones_tail(follow: Follow) -> None:
    def body(out: Followed) -> None:
        out.say("old\n")
        assert out.files.tail("m") == ["old"]
        out.files.attach(UnitHandle("m", "m", HANDLE.pid, 2))
        assert out.files.tail("m") == []
        assert out.say("new\n") == ["new"]
        assert out.files.tail("m") == ["new"]

    follow(body)
