"""Whatever an engine prints as it dies: client, status and `llmux ps` get its cause in one line."""

from __future__ import annotations

import pytest
from daemon_harness import Daemon, Start

from llmux.cli.main import main
from tests.failure_texts import FAILURES

pytestmark = pytest.mark.long

NAMES = {f"model-{at}": name for at, name in enumerate(FAILURES)}
SAYS = "other verbs reach this process with --socket "


@pytest.mark.long
def test_the_cause_of_every_known_failure_is_told_everywhere(
    start_daemon: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon: Daemon = start_daemon({model: {} for model in NAMES})
    line = daemon.log.since(0)[daemon.log.wait(SAYS)]
    for model, name in NAMES.items():
        lines, cause = FAILURES[name]
        daemon.order(model, die_at_start={"lines": lines})
        answer = daemon.chat(model)
        assert (answer.status, answer.code) == (503, "model_start_failed")
        assert cause in answer.message, f"{name}: {answer.message}"
        assert cause in str(daemon.model(model)["message"]), name
    assert main(["ps", "--format", "{name} {message}", "--socket", line.partition(SAYS)[2]]) == 0
    told = dict(one.split(" ", 1) for one in capsys.readouterr().out.splitlines())
    assert told.keys() == NAMES.keys(), "a line for each model"
    for model, name in NAMES.items():
        assert FAILURES[name][1] in told[model], name
