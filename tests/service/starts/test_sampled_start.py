"""An engine that cannot sample is not good: found at its start, not by the first client."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from daemon_harness import Daemon

pytestmark = pytest.mark.long

COMPILES = {"STANDIN_SAMPLER_COMPILES": "1"}


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory with what the stand-in needs on its PATH, and no ninja."""
    (tmp_path / "env").symlink_to("/usr/bin/env")
    return tmp_path


def test_a_compiler_that_is_missing_fails_the_start_and_is_named(
    daemon: Daemon, tools: Path
) -> None:
    daemon.set_models({"alpha": {"env": {**COMPILES, "PATH": str(tools)}}, "other": {}})
    answer = daemon.chat("alpha", temperature=0)
    assert (answer.status, answer.code) == (503, "model_start_failed")
    assert "No such file or directory: 'ninja'" in answer.message
    assert "ninja" in str(daemon.model("alpha")["message"])
    assert daemon.chat("other").status == 200


def test_with_the_compiler_clients_may_sample(daemon: Daemon, tools: Path) -> None:
    ninja = tools / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    daemon.set_models({"alpha": {"env": {**COMPILES, "PATH": path}}})
    assert daemon.chat("alpha", temperature=1).status == 200


def test_without_canaries_nothing_is_asked_at_the_start(daemon: Daemon, tools: Path) -> None:
    daemon.set_models({"alpha": {"canary": False, "env": {**COMPILES, "PATH": str(tools)}}})
    assert daemon.chat("alpha", temperature=0).status == 200
