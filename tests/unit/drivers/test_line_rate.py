"""An engine's lines in the journal: bounded, and what is left out is counted."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path

from llmux.drivers.engine.line_rate import ERRORS, LINES, WINDOW_SECS, LineRate
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.processes.process import start_ticks
from llmux.drivers.systemd.journal import Journal
from llmux.ports import UnitHandle

INFO, ERROR = 6, 3


def test_a_window_has_so_many_lines_and_then_errors_only() -> None:
    now = [100.0]
    rate = LineRate(lambda: now[0])
    assert sum(rate.admits(INFO) for _ in range(LINES + 10)) == LINES
    assert sum(rate.admits(ERROR) for _ in range(ERRORS + 10)) == ERRORS
    assert rate.left_out == 20
    now[0] += WINDOW_SECS
    assert rate.admits(INFO)


def test_a_flood_leaves_lines_out_and_the_journal_is_told_how_many(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir(mode=0o700)
    received: list[bytes] = []

    async def main(journal: socket.socket) -> None:
        files = EngineFiles(str(images), journal=Journal(str(tmp_path / "journal")))
        handle = UnitHandle("m", "llmux-m.scope", 1, start_ticks(1) or 0, "/llmux.slice")
        out, _ = files.paths("m")
        loop = asyncio.get_running_loop()
        loop.add_reader(journal, lambda: received.append(journal.recv(1 << 16)))
        files.attach(handle)
        text = "".join(f"line {number}\n" for number in range(LINES + 3_000))
        await asyncio.to_thread(Path(out).write_text, text)
        while not files.tail("m", 1) or files.tail("m", 1) != [f"line {LINES + 2_999}"]:
            await asyncio.to_thread(lambda: None)
        files.detach("m")
        async with asyncio.timeout(30):
            while b"left out" not in b"".join(received):
                await asyncio.to_thread(lambda: None)
        await files.close()
        loop.remove_reader(journal)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.setblocking(False)
        asyncio.run(main(journal))
    lines = [entry.split(b"\n")[0].decode() for entry in received]
    shown = [line for line in lines if line.startswith("MESSAGE=line ")]
    (left,) = [line for line in lines if "left out" in line]
    assert len(shown) <= LINES
    assert left == "MESSAGE=3000 lines left out; `llmux logs m` has the last ones"


def test_what_is_closed_keeps_no_descriptor(tmp_path: Path) -> None:
    """One inotify instance and two files an engine; a process may have 128 instances."""
    directory = tmp_path / "images"
    directory.mkdir(mode=0o700)

    def watching() -> int:
        found = 0
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # of another thread, and closed since
                kind = os.readlink(f"/proc/self/fd/{name}")
                found += "inotify" in kind or str(tmp_path) in kind
        return found

    async def main() -> None:
        before = watching()
        files = EngineFiles(str(directory), journal=Journal(str(tmp_path / "journal")))
        handle = UnitHandle("m", "llmux-m.scope", 1, start_ticks(1) or 0, "/llmux.slice")
        out, _ = files.paths("m")
        files.attach(handle)
        await asyncio.to_thread(Path(out).write_text, "one\n")
        assert watching() > before
        await files.close()
        async with asyncio.timeout(60):
            while watching() > before:  # it is closed in a thread
                await asyncio.to_thread(lambda: None)

    asyncio.run(main())
