"""scripts/gpu-proof without a GPU: the whole of it with a pretended engine and driver."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "fake_libcuda")]

# ruff: noqa: E402  # the two folders have to be on the path first
from _gpu_proof.client import ProofError, same
from _gpu_proof.matrix import ROWS, Row
from _gpu_proof.report import exit_status, table
from _gpu_proof.whole import Place, Turn, Whole, order
from _gpu_proof.whole import table as whole_table
from fake_cuda import COMPILER, FakeCuda

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the fake libcuda")


def proof(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "gpu-proof"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@needs_compiler
def test_the_pretended_matrix_is_measured_compared_and_written(tmp_path: Path) -> None:
    out = tmp_path / "proof.json"
    done = proof("--fake", "--gib", "4", "--cache-gib", "2", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    rows = {(row["weights"], row["process"]): row for row in document["rows"]}
    assert set(rows) == set(ROWS)
    whole = 4096 + 2048 + 512
    for (weights, process), row in rows.items():
        if row["outcome"] == "not measured":
            # Only what this host lacks, and with the reason.
            assert process in ("freeze", "checkpoint")
            assert row["why"] in done.stdout
            continue
        assert row["outcome"] == "ok", row
        assert row["equal"] is True
        assert (row["before_mib"], row["woken_mib"]) == (whole, whole)
        kept = whole if weights == "retain" else 512
        gone = process in ("cuda_suspend", "checkpoint", "stop")
        assert row["parked_mib"] == (0 if gone else kept)
    assert "no number here says anything about a GPU" in done.stdout


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA driver here")
    done = proof("--rows", "retain+freeze")
    assert done.returncode == 3
    assert "not measured: PyTorch, retain + freeze: no GPU: " in done.stdout


def test_it_runs_with_python_alone() -> None:
    """A GPU host without network has no psutil: before, the script ended at its import."""
    script = str(ROOT / "scripts" / "gpu-proof")
    done = subprocess.run(  # -S: no packages but the standard library's
        [sys.executable, "-I", "-S", script, "--budget", "0", "--rows", "retain+freeze"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 3, done.stderr
    assert "not measured" in done.stdout


@needs_compiler
def test_a_spent_budget_measures_nothing_more_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = proof("--fake", "--gib", "1", "--budget", "0", "--out", str(out))
    assert done.returncode == 3, done.stdout + done.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"not measured"}
    assert {row["why"] for row in rows} == {"the budget of 0 s is used up"}


@needs_compiler
def test_evidence_of_every_step_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = "retain+cuda_suspend"
    done = proof("--fake", "--gib", "1", "--rows", rows, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [
        f"{rows}-{at}" for at in ("before", "parked", "woken")
    ]
    assert steps[1]["used_mib"] == 0
    for number, step in enumerate(steps, 1):
        for pid in step["pids"]:
            place = out / f"{number:02d}-{step['step']}"
            assert "heap" in (place / f"{pid}.maps").read_text()
            assert "socket:" in (place / f"{pid}.fd").read_text()
    assert list((out / "logs").iterdir()), "the engine's log"


@needs_compiler
def test_a_whole_llmux_is_asked_in_turn(tmp_path: Path) -> None:
    """Where CRIU cannot work, without the model that needs it."""
    out = tmp_path / "out"
    done = proof(
        "--fake", "--engines", "none", "--serve", "2", "--criu", "/no/criu", "--out", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured: discard+checkpoint: cannot checkpoint" in done.stdout
    for way in ("discard+cuda_suspend", "offload+keep_running"):
        assert re.search(rf"^\| {re.escape(way)} \| \d+\.\d \| 1 \| ", done.stdout, re.MULTILINE)
    (log,) = (out / "logs").glob("*llmux.log")
    said = log.read_text()
    assert said.count("Spawning vLLM process") == 2
    assert said.count("stopping → stopped (an operator asked)") >= 1
    assert "Traceback" not in said
    found = json.loads((out / "results.json").read_text())["whole"]
    assert found["problem"].startswith("not measured: discard+checkpoint")
    assert [turn["cold"] for turn in found["turns"]] == [True, True, False, False]
    assert {turn["parked_by"] for turn in found["turns"]} == {
        "discard+cuda_suspend", "offload+keep_running"
    }  # fmt: skip
    assert all(turn["first_token_secs"] > 0 for turn in found["turns"])


@pytest.mark.parametrize("gone", [True, False], ids=["it had ended", "it heeds nothing"])
def test_a_llmux_that_answers_no_order_is_ended_all_the_same(tmp_path: Path, gone: bool) -> None:
    """Before, an order that took too long left it and its engines running."""
    run = Whole(Place(tmp_path, tmp_path, "v", "m", (), "criu"), tmp_path / "log")
    script = "trap '' TERM; echo; while :; do sleep 1000; done"
    with (
        socket.socket(socket.AF_UNIX) as deaf,
        subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, process_group=0) as server,
    ):
        deaf.bind(str(tmp_path / "control.sock"))
        deaf.listen()
        assert server.stdout is not None
        server.stdout.readline()  # it ignores SIGTERM from here on
        try:
            if gone:
                server.kill()
                server.wait()
                run._end(server, 0.5)
            else:
                with pytest.raises(ProofError, match=r"did not end within 0\.5 s and was killed"):
                    run._end(server, 0.5)
            assert server.poll() == -signal.SIGKILL
        finally:
            with suppress(ProcessLookupError):  # its sleep
                os.killpg(server.pid, signal.SIGKILL)


TURNS = [
    Turn("suspended", 41.0, "a", cold=True),
    *(Turn("suspended", first, "a", cold=False) for first in (0.5, 0.7, 3.0)),
    Turn("imaged", 44.0, "b", cold=True),
]


def test_turns_are_told_by_how_a_model_was_parked() -> None:
    assert whole_table(TURNS).splitlines()[2:] == [
        "| discard+cuda_suspend | 41.0 | 3 | 0.70 | 0.50 | 3.00 |",
        "| discard+checkpoint | 44.0 | 0 | - | - | - |",
        "| offload+keep_running | - | 0 | - | - | - |",
    ]


def test_no_turn_is_for_the_model_that_is_there() -> None:
    turns = order(["a", "b", "c"], 50)
    assert turns[:3] == ["a", "b", "c"]
    assert len(turns) == 53
    assert all(one != other for one, other in pairwise(turns))


def test_an_unknown_engine_is_refused_with_the_list() -> None:
    done = proof("--engines", "sglang")
    assert done.returncode == 2
    assert "no engine sglang; there are: pytorch, vllm, none" in done.stderr


def test_an_unknown_row_is_refused_with_the_list() -> None:
    done = proof("--rows", "retain+nap")
    assert done.returncode == 2
    assert "no row retain+nap; there are: " in done.stderr


@needs_compiler
def test_an_engine_that_wakes_without_its_weights_answers_differently(tmp_path: Path) -> None:
    from _gpu_proof.tensors import FakeBackend

    backend = FakeBackend(FakeCuda(tmp_path).directory, 1.0, 1.0, 7)
    before = backend.generate((1, 2), 4)
    backend.discard()
    backend.wake_weights()
    backend.wake_cache()
    assert backend.generate((1, 2), 4) != before
    backend.reload_weights()
    backend.reset_prefix_cache()
    assert backend.generate((1, 2), 4) == before


@pytest.mark.parametrize(
    ("now", "tolerance", "expected"),
    [
        ([("a", [-1.0, None])], 0.0, True),
        ([("a", [-1.01, None])], 0.0, False),
        ([("a", [-1.01, None])], 0.05, True),
        ([("b", [-1.0, None])], 0.05, False),
    ],
)
def test_answers_are_compared_by_words_and_log_probs(
    now: list[Any], tolerance: float, expected: bool
) -> None:
    assert same(now, [("a", [-1.0, None])], tolerance) is expected


def test_the_table_and_the_status_tell_right_wrong_and_unmeasured_apart() -> None:
    good = Row("e", "retain", "stop", park_s=1.0, wake_s=2.5, equal=True)
    wrong = Row("e", "discard", "freeze", equal=False, outcome="failed")
    unknown = Row("e", "retain", "freeze", outcome="not measured")
    assert exit_status([good, unknown]) == 0
    assert exit_status([good, wrong]) == 1
    assert exit_status([unknown]) == 3
    lines = table([good, wrong, unknown]).splitlines()
    assert "2.50" in lines[2]
    assert "NO" in lines[3]
    assert len({len(line) for line in lines}) == 1
