"""``llmux ps``: what is in the table, and how it fits a terminal."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from llmux.cli import ps
from llmux.cli.main import build_parser
from llmux.errors import LlmuxError

MODEL: dict[str, Any] = {
    "state": "parked",
    "since_secs": 300.0,
    "pid": 42,
    "parked_as": "offload+keep_running",
    "eviction": "discard+stop",
    "queue_depth": 1,
    "oldest_wait_secs": 12.4,
    "in_flight": 2,
    "idle_secs": 0.0,
    "gpus": [0, 1],
    "gpu_bytes": 3 * 2**30,
    "ram_bytes": 512 * 2**20,
    "image": None,
    "why": "waits for alpha: 1 request in flight, at most 108 s",
    "phase": None,
    "phase_text": None,
    "progress": None,
    "usual_secs": None,
    "left_secs": None,
    "pinned": False,
    "stale": False,
    "writing_image": False,
}
STARTING = MODEL | {
    "state": "starting",
    "parked_as": None,
    "phase": "load_weights",
    "phase_text": "loading weights",
    "progress": {"done": 3, "total": 8, "unit": "shards"},
    "usual_secs": 60.0,
    "left_secs": 41.3,
    "idle_secs": None,
    "oldest_wait_secs": None,
    "gpu_bytes": None,
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``shown(words, models)``: what ``llmux ps`` prints."""

    def run(*words: str, observer: str = "ok", **models: dict[str, Any]) -> str:
        status = {"models": models, "gpu_observer": observer}
        monkeypatch.setattr(ps, "ask", lambda *_: status)
        args: argparse.Namespace = build_parser().parse_args(["ps", *words])
        args.run(args)
        return capsys.readouterr().out

    return run


def test_the_table_says_who_waits_for_what_and_what_is_held(shown: Any) -> None:
    head, row = shown(qwen=MODEL).splitlines()
    assert head.split() == [
        *("MODEL", "STATE", "SINCE", "WAITING", "IN", "FLIGHT", "IDLE", "GPUS", "GPU/RAM"),
        *("PARKING", "IMAGE", "PID", "WHY"),
    ]
    cells = ["qwen", "parked", "5m", "1", "(12s)", "2", "now", "0,1", "3.00GiB/512MiB"]
    assert row.split()[:9] == cells
    assert row.split()[9:12] == ["offload+keep_running", "-", "42"]
    assert row.endswith("waits for alpha: 1 request in flight, at most 108 s")


def test_a_start_shows_its_phase_with_what_is_left_and_else_what_is_usual() -> None:
    assert ps.explanation(STARTING) == "loading weights 3 of 8 shards, about 41s left"
    late = STARTING | {"left_secs": None, "progress": None}
    assert ps.explanation(late) == "loading weights, usually done after 60s"
    packed = STARTING | {
        "phase_text": "checksums",
        "progress": {"done": 2**20, "total": 2**30, "unit": "bytes"},
        "left_secs": None,
        "usual_secs": None,
    }
    assert ps.explanation(packed) == "checksums 1 MiB of 1.00 GiB"


def test_a_pin_and_an_old_engine_are_marked() -> None:
    one = MODEL | {"why": None, "pinned": True, "stale": True}
    assert ps.explanation(one) == "pinned; older than its configuration: llmux restart"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_fits_the_terminal_and_keeps_what_matters(width: int) -> None:
    lines = ps.table({"a-model-with-a-long-name": MODEL, "b": STARTING}, width)
    assert all(len(line) <= width for line in lines)
    for head in ("MODEL", "STATE", "WAITING", "IN FLIGHT", "WHY"):
        assert head in lines[0] or width < 70
    assert lines[1].endswith(("at most 108 s", "…"))
    assert ("PARKING" in lines[0]) == (width >= 200)


def test_names_alone(shown: Any) -> None:
    assert shown("-q", b=MODEL, a=MODEL) == "a\nb\n"
    assert shown("-q") == ""
    assert shown("-q", "b", b=MODEL, a=MODEL) == "b\n"


def test_an_unknown_model_is_an_error_that_names_it(shown: Any) -> None:
    with pytest.raises(LlmuxError, match="cannot show c: no such model"):
        shown("c", a=MODEL)


def test_a_format_of_ones_own(shown: Any) -> None:
    assert shown("--format", r"{name}\t{state} {gpu_bytes}", a=MODEL) == "a\tparked 3221225472\n"
    assert shown("--format", "{gpu_bytes}", b=STARTING) == "-\n"
    with pytest.raises(LlmuxError, match=r"cannot print \{stat\}: no such field .*state"):
        shown("--format", "{stat}", a=MODEL)


def test_json_is_the_models_themselves(shown: Any) -> None:
    assert json.loads(shown("--json", a=MODEL)) == {"a": MODEL}


def test_watching_prints_again_until_it_is_interrupted(
    shown: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("llmux.cli.ps.time.sleep", pause)
    with pytest.raises(KeyboardInterrupt):
        shown("--watch", "-q", a=MODEL)
    assert (pauses, capsys.readouterr().out) == ([2.0] * 3, "a\na\na\n")


def test_it_says_that_gpu_memory_cannot_be_seen(shown: Any) -> None:
    blind = "a call has not returned for 7 s"
    said = shown(observer=blind, qwen=MODEL).splitlines()[-1]
    assert said == f"GPU memory cannot be seen, so no GPU that is left counts as free: {blind}"
    assert blind not in shown("--json", observer=blind, qwen=MODEL)


def test_a_model_whose_image_is_being_written_holds_no_gpu(shown: Any) -> None:
    phase = {"phase": "dump", "phase_text": "CRIU dump", "usual_secs": None, "left_secs": None}
    model = MODEL | phase | {"state": "parking", "writing_image": True}
    assert "CRIU dump; its GPU is free already" in shown(qwen=model)
