"""The command line and `llmux serve`, as an operator uses them together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_harness import Daemon

from llmux.cli.main import main

pytestmark = pytest.mark.long

SAYS = "other verbs reach this process with --socket "


def control(daemon: Daemon) -> str:
    line = daemon.log.since(0)[daemon.log.wait(SAYS)]
    return line.partition(SAYS)[2]


def test_the_verbs_reach_it(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    socket = ["--socket", control(daemon)]
    assert main(["load", "other", *socket]) == 0
    assert capsys.readouterr().out == "Model other is serving\n"
    assert main(["ps", "--json", *socket]) == 0
    assert json.loads(capsys.readouterr().out)["other"]["state"] == "serving"
    assert main(["logs", "other", "-n", "1", *socket]) == 0
    assert "Application startup complete" in capsys.readouterr().out
    assert main(["sleep", "other", "--eviction", "offload+nap", *socket]) == 3
    assert "keep_running|freeze" in capsys.readouterr().err
    assert main(["checkpoint", *socket]) == 0
    assert capsys.readouterr().out == "no images\n"


def test_a_socket_that_somebody_listens_at_is_left_alone(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"gateway: {{listen: ['unix:{tmp_path}/h']}}\nmetrics_port: 0\n"
        "models: {a: {model_path: m}}\n"
    )
    second = subprocess.run(
        [sys.executable, "-m", "llmux", "serve", "-c", str(file), "--socket", control(daemon)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 1
    assert "another llmux does (choose another --socket)" in second.stderr
    assert main(["ps", "--socket", control(daemon)]) == 0
