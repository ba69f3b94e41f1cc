"""EngineOutput: the rules that the files and the twin keep alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmux.drivers.engine.output import KEEP_LINES, MOST_BEHIND, EngineFiles
from llmux.drivers.processes.process import start_ticks
from llmux.ports import EngineOutput, UnitHandle
from tests.twins.units import MemoryOutput
from tests.twins.world import World

Say = Callable[[str], None]


def handle_of(model: str = "alpha", ticks: int = 0) -> UnitHandle:
    own = os.getpid()
    return UnitHandle(model, f"llmux-{model}", own, ticks or start_ticks(own) or 1)


def size_of(path: str) -> int:
    return os.path.getsize(path)


def with_output(kind: str, directory: Path, body: Callable[[EngineOutput, Say], None]) -> None:
    async def main() -> None:
        if kind == "memory":
            world = World()
            body(
                MemoryOutput(world), lambda line: world.output.setdefault("alpha", []).append(line)
            )
            return
        output = EngineFiles(str(directory))
        path = output.paths("alpha")[0]

        def say(line: str) -> None:
            with open(path, "a") as file:
                file.write(line + "\n")

        body(output, say)
        await output.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["memory", "files"])
class TestEngineOutput:
    def test_two_files_for_each_model(self, kind: str, tmp_path: Path) -> None:
        def body(output: EngineOutput, _: Say) -> None:
            stdout, stderr = output.paths("alpha")
            assert stdout.endswith("/alpha/stdout.log")
            assert stderr.endswith("/alpha/stderr.log")

        with_output(kind, tmp_path, body)

    def test_an_unknown_model_has_said_nothing(self, kind: str, tmp_path: Path) -> None:
        def body(output: EngineOutput, _: Say) -> None:
            assert output.tail("alpha") == []
            output.detach("alpha")

        with_output(kind, tmp_path, body)

    def test_the_last_lines_oldest_first_even_after_the_end(
        self, kind: str, tmp_path: Path
    ) -> None:
        def body(output: EngineOutput, say: Say) -> None:
            output.attach(handle_of())
            for number in range(30):
                say(f"line {number}")
            assert output.tail("alpha", 2) == ["line 28", "line 29"]
            assert len(output.tail("alpha")) == 20
            assert output.tail("alpha", 0) == []
            output.detach("alpha")
            assert output.tail("alpha", 1) == ["line 29"]

        with_output(kind, tmp_path, body)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    assert EngineFiles(str(tmp_path)).shortage() is None
    assert EngineFiles(str(tmp_path / "not yet")).shortage() is None
    said = EngineFiles("/proc").shortage()  # a file system without a free byte
    assert said is not None
    assert said.startswith("the disk of /proc is full")


class TestTheFiles:
    def follow(self, directory: Path, script: Callable[[EngineFiles, str], None]) -> list[str]:
        """Lines that were passed on while the script ran and the files were closed."""
        seen: list[str] = []

        async def main() -> None:
            output = EngineFiles(str(directory), on_line=lambda _, line: seen.append(line))
            script(output, output.paths("alpha")[0])
            await output.close()

        asyncio.run(main())
        return seen

    def append(self, path: str, data: bytes) -> None:
        with open(path, "ab") as file:
            file.write(data)

    def test_a_directory_of_images_that_it_makes_is_roots_alone(self, tmp_path: Path) -> None:
        EngineFiles(str(tmp_path / "images")).paths("alpha")
        assert os.stat(tmp_path / "images").st_mode & 0o777 == 0o700

    def test_what_is_said_before_attach_counts(self, tmp_path: Path) -> None:
        def script(output: EngineFiles, path: str) -> None:
            self.append(path, b"early\n")
            output.attach(handle_of())
            assert output.tail("alpha") == ["early"]

        assert self.follow(tmp_path, script) == ["early"]

    def test_the_next_supervisor_goes_on_where_the_former_stopped(self, tmp_path: Path) -> None:
        def first(output: EngineFiles, path: str) -> None:
            output.attach(handle_of())
            self.append(path, b"one\ntw")
            assert output.tail("alpha") == ["one", "tw"]
            # As after SIGKILL: the unfinished line is not passed on, nothing more is written down.
            for file in output._models["alpha"].files:
                file.close()
            output._models.clear()

        def second(output: EngineFiles, path: str) -> None:
            self.append(path, b"o\nthree\n")
            output.attach(handle_of())
            assert output.tail("alpha") == ["one", "two", "three"]

        assert self.follow(tmp_path, first) == ["one"]
        assert self.follow(tmp_path, second) == ["two", "three"]

    def test_a_new_run_begins_with_an_empty_tail(self, tmp_path: Path) -> None:
        def first(output: EngineFiles, path: str) -> None:
            output.attach(handle_of(ticks=1))
            self.append(path, b"old\n")

        def second(output: EngineFiles, path: str) -> None:
            output.attach(handle_of(ticks=2))
            assert output.tail("alpha") == []
            self.append(path, b"new\n")
            assert output.tail("alpha") == ["new"]

        assert self.follow(tmp_path, first) == ["old"]
        assert self.follow(tmp_path, second) == ["new"]

    def test_escapes_progress_bars_and_unfinished_lines(self, tmp_path: Path) -> None:
        def script(output: EngineFiles, path: str) -> None:
            output.attach(handle_of())
            self.append(path, b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07end\n")
            self.append(path, b" 0%|   |\r 50%|#  |\r100%|###|\n\xff\xfe\nunfinished")
            assert output.tail("alpha")[-1] == "unfinished"

        seen = self.follow(tmp_path, script)
        assert seen == ["red end", "100%|###|", "\ufffd\ufffd", "unfinished"]

    def test_a_progress_bar_is_seen_before_its_line_ends(self, tmp_path: Path) -> None:
        seen: list[tuple[str, str]] = []

        def script(output: EngineFiles, path: str) -> None:
            output.on_progress = lambda model, text: seen.append((model, text))
            output.attach(handle_of())
            self.append(path, b"no bar yet")
            output.tail("alpha")
            self.append(path, b"\r 12%| 8/67\r 13%| 9/67")
            output.tail("alpha")

        self.follow(tmp_path, script)
        assert seen == [("alpha", " 13%| 9/67")]

    def test_what_a_former_engine_said_is_read_back_by_another_supervisor(
        self, tmp_path: Path
    ) -> None:
        def engine(word: str, ticks: int) -> Callable[[EngineFiles, str], None]:
            def script(output: EngineFiles, path: str) -> None:
                output.attach(handle_of(ticks=ticks))
                self.append(path, f"{word}\nof {word}\n".encode())
                output.tail("alpha")

            return script

        def look(output: EngineFiles, _: str) -> None:
            assert output.tail("alpha") == ["second", "of second"]
            assert output.previous("alpha") == ["first", "of first"]
            assert output.previous("alpha", 1) == ["of first"]
            assert output.previous("beta") == [] == output.tail("beta")

        self.follow(tmp_path, engine("first", 1))
        self.follow(tmp_path, engine("second", 2))
        self.follow(tmp_path, look)
        assert not (tmp_path / "beta").exists(), "looking makes nothing"

    def test_a_file_that_was_cut_has_no_former_part(self, tmp_path: Path) -> None:
        def script(output: EngineFiles, path: str) -> None:
            for ticks in (1, 2):
                output.attach(handle_of(ticks=ticks))
                self.append(path, b"line\n")
                output.tail("alpha")
            os.truncate(path, 0)
            assert output.previous("alpha") == []

        self.follow(tmp_path, script)

    def test_a_huge_line_comes_in_pieces_and_does_not_stay_in_memory(self, tmp_path: Path) -> None:
        def script(output: EngineFiles, path: str) -> None:
            output.attach(handle_of())
            self.append(path, b"x" * 1_000_000)
            output.tail("alpha")
            assert sum(len(file.partial) for file in output._models["alpha"].files) <= 16 * 1024

        assert sum(map(len, self.follow(tmp_path, script))) == 1_000_000

    def test_a_file_too_big_is_cut_once_passed_on(self, tmp_path: Path) -> None:
        async def main() -> None:
            seen: list[str] = []
            output = EngineFiles(
                str(tmp_path), max_file=1000, on_line=lambda _, line: seen.append(line)
            )
            path = output.paths("alpha")[0]
            output.attach(handle_of())
            lines = [f"line {number}" for number in range(500)]
            self.append(path, "\n".join(lines).encode() + b"\n")
            output.tail("alpha")
            assert size_of(path) == 0
            self.append(path, b"after\n")
            assert output.tail("alpha", 1) == ["after"]
            assert seen == [*lines, "after"]
            await output.close()

        asyncio.run(main())

    def test_what_cannot_be_read_in_time_is_left_out_and_the_last_lines_are_read(
        self, tmp_path: Path
    ) -> None:
        """An engine that wrote 200 MB held the loop for half a minute when it ended."""
        lines = [f"line {number:0100}" for number in range(50_000)]

        def script(output: EngineFiles, path: str) -> None:
            output.attach(handle_of())
            self.append(path, "\n".join(lines).encode() + b"\n")
            assert output.tail("alpha") == lines[-20:]

        seen = self.follow(tmp_path, script)
        # Whole lines, the newest, and not more than are read in a moment.
        assert seen == lines[-len(seen) :]
        assert sum(map(len, seen)) <= MOST_BEHIND

    def test_lines_are_seen_by_the_loop_without_being_asked_for(self, tmp_path: Path) -> None:
        async def main() -> None:
            told = asyncio.Event()
            output = EngineFiles(str(tmp_path), on_line=lambda *_: told.set())
            path = output.paths("alpha")[1]
            output.attach(handle_of())
            self.append(path, b"hello\n")
            async with asyncio.timeout(5):
                await told.wait()
            await output.close()

        asyncio.run(main())

    def test_only_so_many_lines_are_kept(self, tmp_path: Path) -> None:
        def script(output: EngineFiles, path: str) -> None:
            output.attach(handle_of())
            self.append(path, b"x\n" * (KEEP_LINES + 50))
            assert len(output.tail("alpha", 10_000)) == KEEP_LINES

        self.follow(tmp_path, script)
