"""The command line of checkpoints: its forms, its table, its progress, its exit status."""

from __future__ import annotations

import io
import json
import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llmux.cli.client import NotRunningError, ask
from llmux.cli.images.checkpoints import POLICIES, table
from llmux.cli.main import build_parser, main, verb_of
from llmux.cli.progress import Progress
from llmux.core.plans import StepKind
from llmux.errors import LlmuxError, Refused
from llmux.image_ports import DumpPhase
from llmux.phases import phase_text
from llmux.protocol import Answer
from llmux.protocol import Progress as Told

ROW = {
    "policy": "discard+checkpoint",
    "sleep_secs": 1.234,
    "wake_secs": 0.5,
    "gpu_before_bytes": 3 * 2**30,
    "gpu_parked_bytes": 0,
    "gpu_woken_bytes": 3 * 2**30,
    "image_bytes": 5 * 2**20,
    "response": "match",
    "passed": True,
    "problems": [],
}


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        ("", "serve"),
        ("--checkpoint m", "checkpoint -- m"),
        ("--checkpoint m --no-warmup", "checkpoint --no-warmup -- m"),
        (
            "--checkpoint m --eviction discard+checkpoint",
            "checkpoint --eviction=discard+checkpoint -- m",
        ),
        ("--validate m", "validate -- m"),
        ("--validate m --policies a+b,c+d", "validate --policies=a+b,c+d -- m"),
        ("--restore-detached m", "restore --detached -- m"),
    ],
)
def test_the_earlier_forms_are_verbs(words: str, verb: str) -> None:
    assert verb_of(build_parser().parse_args(words.split())) == verb.split()


def test_the_default_policies_are_the_earlier_ones() -> None:
    assert build_parser().parse_args(["validate", "m"]).policies == POLICIES


def test_a_row_shows_what_was_measured_and_what_was_not() -> None:
    unknown = dict.fromkeys(ROW) | {"policy": "retain+stop", "passed": False}
    _, measured, failed = table([ROW, unknown])
    assert measured[1:6] == ("1.23", "0.50", "3072 MiB", "0 MiB", "3072 MiB")
    assert measured[6:] == ("5 MiB", "match", "yes")
    assert failed == ("retain+stop", *["-"] * 7, "NO")


def test_progress_is_a_line_per_phase_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress("m", out) as progress:
        progress("dump", 0.0, 0, 0)
        progress("dump", 1.0, 5, 10)
        progress("pack", 2.0, 5, 10)
    assert out.getvalue() == "m: CRIU dump (0.0 s)\nm: checksums (2.0 s)\n"


def test_on_a_terminal_shards_and_graphs_are_counted_as_such() -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("m", out) as progress:
        progress("load_weights", 2.0, 3, 8)
        progress("compile", 3.0, 0, 0)
    assert "m: loading weights 3 of 8 shards  2 s" in out.getvalue()
    assert "m: compiling  3 s" in out.getvalue()


def test_every_step_has_a_word() -> None:
    assert not [kind for kind in StepKind if phase_text(kind.value) == kind.value]
    assert not [phase for phase in DumpPhase if phase_text(phase.value) == phase.value]


def test_on_a_terminal_it_is_one_line_with_the_bytes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("m", out) as progress:
        progress("dump", 3.4, 2**20, 2**30)
    assert "m: CRIU dump 1 MiB of 1.00 GiB  3 s" in out.getvalue()
    assert out.getvalue().endswith("\x1b[K"), "the line is gone at the end"


@pytest.fixture
def control(tmp_path: pathlib.Path) -> Iterator[tuple[str, list[bytes]]]:
    """A control socket that says the given lines to the first who asks."""
    path = str(tmp_path / "control.sock")
    lines: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def serve() -> None:
            peer, _ = listening.accept()
            with peer, peer.makefile("rb") as asked:
                asked.readline()
                asked.readline()
                peer.sendall(b"".join(lines))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path, lines
        thread.join(5)


def test_progress_comes_before_the_answer(control: tuple[str, list[bytes]]) -> None:
    path, lines = control
    lines += [Told(1, "dump", 0.5, 1, 2).encode(), Answer(1, True, {"message": "done"}).encode()]
    heard: list[Any] = []
    answer = ask(path, "checkpoint", {"model": "m"}, progress=lambda *told: heard.append(told))
    assert answer == {"message": "done"}
    assert heard == [("dump", 0.5, 1, 2)]


def test_what_was_tried_and_failed_is_no_refusal(control: tuple[str, list[bytes]]) -> None:
    path, lines = control
    lines.append(
        Answer(1, False, None, "internal_error", "cannot checkpoint m: disk full").encode()
    )
    with pytest.raises(LlmuxError, match="disk full") as raised:
        ask(path, "checkpoint")
    assert not isinstance(raised.value, Refused)


def test_nobody_listens(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotRunningError):
        ask(str(tmp_path / "none"), "status")


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_a_validation_that_fails_is_seen_by_scripts(
    control: tuple[str, list[bytes]],
    capsys: pytest.CaptureFixture[str],
    passed: bool,
    status: int,
) -> None:
    path, lines = control
    result = {"passed": passed, "message": "Result: x", "policies": [ROW]}
    lines.append(Answer(1, True, result).encode())
    assert main(["validate", "m", "--socket", path, "--json"]) == status
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize(
    ("reused", "said"),
    [
        (True, ["m has an image of discard+checkpoint already"]),
        (False, ["started     61.0 s", "checkpoint  2.5 s (discard+checkpoint)"]),
    ],
)
def test_what_became_of_a_checkpoint_is_said(
    control: tuple[str, list[bytes]],
    capsys: pytest.CaptureFixture[str],
    reused: bool,
    said: list[str],
) -> None:
    path, lines = control
    result = {
        "reused": reused,
        "eviction": "discard+checkpoint",
        "start_secs": 61.0,
        "checkpoint_secs": 2.5,
        "disk_bytes": 3 * 2**30,
        "apparent_bytes": 4 * 2**30,
        "path": "/var/lib/llmux/m/image",
    }
    lines.append(Answer(1, True, result).encode())
    assert not main(["checkpoint", "m", "--socket", path])
    assert capsys.readouterr().out.splitlines() == [
        *said,
        "image       /var/lib/llmux/m/image",
        "size        3.00 GiB on disk, 4.00 GiB in all",
        "",
        "to restore it on the first request, in the model's configuration:",
        '  checkpoint_path: "/var/lib/llmux/m/image"',
    ]
