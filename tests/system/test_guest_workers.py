"""Several gateway workers on one port under systemd: shared out, replaced, restarted."""

from __future__ import annotations

import pytest
from llmux_guest import LlmuxGuest, model

from tests.seeds import seed_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

WORKERS = {"gateway": {"workers": 3}}
SPEED = {"STANDIN_TOKENS_PER_SEC": "40"}  # a stream takes five seconds


def test_a_killed_worker_takes_only_its_own_streams(llmux: LlmuxGuest) -> None:
    llmux.begin({"alpha": model(env=SPEED)}, **WORKERS)
    report = llmux.load("workers")
    print(f"a killed worker: {report}")
    assert report["workers"] == len(report["requests_by_worker"]) == 3
    assert len(report["requests_by_worker_after"]) == 3
    assert 0 < report["broken"] < report["streams"]
    assert report["broken_of_workers"] == 1
    assert report["broken_elsewhere"] == []
    assert report["refused"] == 0
    assert report["same_parent"]
    assert report["replaced"]
    assert report["new_workers"] == 1


def test_no_connection_is_refused_while_all_workers_are_away(llmux: LlmuxGuest) -> None:
    llmux.begin({"alpha": model(), "beta": model()}, **WORKERS)
    report = llmux.load("flood")
    print(f"kill of a gateway of three: {report}")
    assert report["made_while_no_gateway_ran"] > 20
    assert report["refused"] == 0
    assert report["failed"] == []


def test_blows_under_load_with_several_workers(llmux: LlmuxGuest) -> None:
    seed = seed_of("LLMUX_STORM_SEED")
    speed = {"STANDIN_TOKENS_PER_SEC": "200"}
    llmux.begin({name: model(env=speed) for name in ("alpha", "beta")}, **WORKERS)
    blows = ["restart supervisor*3", "kill supervisor*3", "restart gateway*2"]
    report = llmux.load("kills/storm", f"--seed={seed}", *blows)
    print(f"three workers: {report}")
    assert report["wrong"] == [], llmux.journal()
    assert report["failed"] == [], llmux.journal(lines=200)
    assert report["stuck"] == 0
    assert report["refused_connections"] == 0
    assert report["blows"] == 8
