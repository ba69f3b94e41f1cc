"""``llmux top``: the screen as text, and the real program in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from test_watch import supervisor

from llmux.cli.main import main
from llmux.cli.top import NARROW, lines

GIB = 1 << 30


def model(state: str, **facts: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "state": state, "since_secs": 12.0, "queue_depth": 0, "oldest_wait_secs": None,
        "in_flight": 0, "idle_secs": None, "gpus": [0], "gpu_memory": 0.5, "gpu_bytes": None,
        "ram_bytes": None, "parked_as": None, "eviction": "retain+stop", "image": None,
        "pid": None, "phase": None, "phase_text": None, "progress": None, "left_secs": None,
        "usual_secs": None, "why": None, "pinned": False, "stale": False, "writing_image": False,
    }  # fmt: skip
    return base | facts


def status(**models: Any) -> dict[str, Any]:
    return {
        "state": "active:alpha", "mode": {"mode": "auto"}, "gpu_count": 1, "gpu_observer": "ok",
        "gpus": [{"index": 0, "total_bytes": 80 * GIB, "used_bytes": 30 * GIB,
                  "engines_bytes": 20 * GIB}],
        "orders": [{"id": 7, "verb": "load", "models": ["beta"], "by": "root",
                    "since_secs": 3.0}],
        "models": models,
    }  # fmt: skip


SHOWN = status(
    idle=model("stopped"),
    alpha=model("serving", in_flight=2, gpu_bytes=20 * GIB),
    beta=model("stopped", queue_depth=3, oldest_wait_secs=9.0, why="waits for alpha: 2 streams"),
    broken=model("failed", why="CUDA out of memory \x1b[31m"),
)


def test_what_needs_a_look_comes_first() -> None:
    shown = lines(SHOWN, 160)
    assert "4 models  2 in flight  3 waiting  auto" in shown[0]
    assert re.match(r"GPU 0 \[#{10}\+{10}~{5} +\] 30\.00 GiB of 80\.00 GiB  alpha", shown[1])
    assert shown[2] == "order 7: load beta, by root, for 3s"
    names = [line.split()[0] for line in shown[5:]]
    assert names == ["broken", "alpha", "beta", "idle"]
    assert "waits for alpha: 2 streams" in next(line for line in shown if line.startswith("beta"))


@pytest.mark.parametrize("width", [20, 40, 80, 400])
def test_no_line_is_wider_than_the_terminal_nor_steers_it(width: int) -> None:
    shown = lines(SHOWN, width)
    assert max(map(len, shown)) <= width
    assert all(line.isprintable() for line in shown)
    assert any(line.startswith("broken") and "failed" in line for line in shown)
    if width >= 40:
        assert "alpha" in shown[1], "what is on the GPU"


LONG = "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_long_name_leaves_room_for_its_state(width: int) -> None:
    progress = {"done": 21, "total": 48, "unit": "shards"}
    loading = {"phase": "load_weights", "phase_text": "loading weights", "progress": progress}
    models = {LONG: model("serving", in_flight=12), "b": model("starting", **loading)}
    shown = lines(status(**models), width)
    served = next(at for at, line in enumerate(shown[4:], 4) if line.startswith("Qwen/"))
    assert "2507-FP8" in shown[served] and "serving" in shown[served]
    assert "12" in (shown[served + 1] if width < NARROW else shown[served])
    assert any("loading weights 21" in line for line in shown)
    assert "12 in flight" in shown[0]


def test_names_that_would_be_the_same_stay_whole() -> None:
    names = [f"{'x' * 40}{middle}{'y' * 40}" for middle in "ab"]
    shown = lines(status(**{name: model("stopped") for name in names}), 120)
    assert {line.split()[0] for line in shown[5:]} == set(names)


def test_a_gpu_that_cannot_be_seen_shows_its_claims() -> None:
    blind = SHOWN | {"gpus": [], "gpu_observer": "the driver does not answer"}
    shown = lines(blind, 100)
    assert re.match(r"GPU 0 \[\+{12} +\] 50% claimed", shown[1])
    assert "GPU memory cannot be seen: the driver does not answer" in shown


def test_without_a_terminal_it_says_what_else_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--socket", str(tmp_path / "s")]) == 1
    assert "not a terminal (llmux ps)" in capsys.readouterr().err


class Terminal:
    """``llmux top`` in a pseudo-terminal; all that it wrote is in ``text``."""

    def __init__(self, path: Path, columns: int) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:  # pragma: no cover (another process)
            os.environ |= {"TERM": "xterm", "LINES": "", "COLUMNS": ""}
            for name in ("LINES", "COLUMNS"):
                del os.environ[name]
            command = [sys.executable, "-m", "llmux", "top", "--socket", str(path)]
            # the size is set before the program looks
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 12, columns, 0, 0))
            os.execv(sys.executable, command)  # the program under test
        self.text = ""

    def until(self, wanted: str) -> None:
        ends = time.monotonic() + 20
        while wanted not in self.text:
            assert time.monotonic() < ends, self.text
            if select.select([self.master], [], [], 0.5)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            else:
                self.press(b"\x0c")  # draw all: else only the letters that differ are written

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self) -> int:
        try:
            while os.read(self.master, 65536):
                pass
        except OSError:  # EIO: its other end is closed
            pass
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("columns", [24, 120])
def test_it_draws_scrolls_and_ends(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "s"
    many = status(**{f"model-{number:02}": model("stopped") for number in range(30)})
    with supervisor(path, many, []):
        terminal = Terminal(path, columns)
        terminal.until("model-00")
        assert "model-29" not in terminal.text
        terminal.press(b"j" * 40)
        terminal.until("model-29")
        terminal.press(b"q")
        assert terminal.ended() == 0


def test_a_supervisor_that_went_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with supervisor(path, SHOWN, []):
        terminal = Terminal(path, 120)
        terminal.until("alpha")
    path.unlink()
    terminal.until("cannot reach the supervisor")
    with supervisor(path, SHOWN | {"state": "active:other"}, []):
        terminal.until("active:other")
        terminal.press(b"q")
        assert terminal.ended() == 0
