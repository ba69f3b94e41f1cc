"""What the verbs print with --json is what the package's schema says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import Daemon

from llmux.cli.main import main
from tests.json_shape import faults, schema

pytestmark = pytest.mark.long

OUTPUTS = schema("outputs.schema.json")["$defs"]
SAYS = "other verbs reach this process with --socket "
Printed = Callable[..., Any]


@pytest.fixture
def printed(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Runs a verb with --json; what it printed, which must be one document, or lines of them."""
    line = daemon.log.since(0)[daemon.log.wait(SAYS)]
    control = ["--socket", line.partition(SAYS)[2]]

    def run(*words: str, status: int = 0, local: bool = False, lines: bool = False) -> Any:
        where = ["-c", str(daemon.config_file)] if local else control
        assert main([*words, "--json", *where]) == status, capsys.readouterr().err
        text = capsys.readouterr().out
        return [json.loads(one) for one in text.splitlines()] if lines else json.loads(text)

    return run


ORDERS = (
    ("load", "other"), ("pin", "other"), ("unpin", "other"), ("sleep", "other"),
    ("restart", "other"), ("unload", "other", "--no-wait"), ("cancel", "--all"), ("mode", "auto"),
)  # fmt: skip


def test_orders_and_their_lists(printed: Printed) -> None:
    for words in ORDERS:
        assert faults(OUTPUTS["order"], printed(*words)) == [], words
    assert faults(OUTPUTS["mode"], printed("mode")) == []
    assert faults(OUTPUTS["orders"], printed("orders")) == []
    for flags in ([], ["--dry-run"]):
        assert faults(OUTPUTS["reload"], printed("reload", *flags)) == []
    printed("load", "other")
    events = printed("events", lines=True)
    assert {event["type"] for event in events} >= {"transition", "switch", "order"}
    assert [faults(OUTPUTS["event"], event) for event in events] == [[]] * len(events)
    assert faults(OUTPUTS["logs"], printed("logs", "other")) == []
    assert faults(OUTPUTS["images"], printed("images", "ls")) == []
    assert faults(OUTPUTS["run"], printed("run", "other", "hello", local=True)) == []
    tried = printed("validate", "other", "--policies", "offload+keep_running")
    assert faults(OUTPUTS["validate"], tried) == []


def test_what_needs_no_supervisor(printed: Printed, tmp_path: Path) -> None:
    assert faults(OUTPUTS["check"], printed("check", local=True)) == []
    assert faults(OUTPUTS["config"], printed("config", local=True)) == []
    assert faults(OUTPUTS["version"], printed("version", local=True)) == []
    # this machine may lack anything: the status is not what is looked at
    found: Any = None
    for status in (0, 1):
        try:
            found = printed("doctor", local=True, status=status)
            break
        except AssertionError:
            continue
    assert faults(OUTPUTS["doctor"], found) == []
    keys = str(tmp_path / "keys")
    made = printed("key", "new", "one", "--file", keys, local=True)
    assert faults(OUTPUTS["key"], made) == []
    assert made["key"]
    assert faults(OUTPUTS["keys"], printed("key", "list", "--file", keys, local=True)) == []
    revoked = printed("key", "revoke", "one", "--file", keys, local=True)
    assert faults(OUTPUTS["key"], revoked) == []


def test_failures_are_documents_too(printed: Printed, tmp_path: Path) -> None:
    failures = {
        ("load", "ghost"): 3, ("checkpoint", "other"): 3, ("images", "prune"): 1,
        ("cancel", "77"): 3, ("logs", "ghost"): 3,
    }  # fmt: skip
    for words, status in failures.items():
        assert faults(OUTPUTS["error"], printed(*words, status=status)) == [], words
    several = printed("load", "other", "ghost", status=3)
    assert faults(OUTPUTS["order"], several["other"]) == []
    assert faults(OUTPUTS["error"], several["ghost"]) == []
    bad = tmp_path / "bad.yaml"
    bad.write_text("models: {a: {model_path: m, bogus: 1}}")
    assert faults(OUTPUTS["check"], printed("check", str(bad), local=True, status=78)) == []
    assert faults(OUTPUTS["error"], printed("run", "ghost", "x", local=True, status=1)) == []
