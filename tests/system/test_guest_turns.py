"""Two models take turns behind one endpoint: right answers, whole streams, memory given back."""

from __future__ import annotations

import os

import pytest
from llmux_guest import LlmuxGuest, model

from tests.seeds import seed_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("alpha", "beta", "count", "residue"),
    [
        ("offload+keep_running", "discard+keep_running", 200, ["context"]),
        ("offload+freeze", "discard+freeze", 200, ["context"]),
        ("retain+stop", "retain+stop", 24, []),
    ],
)
def test_alternating_requests(
    llmux: LlmuxGuest, alpha: str, beta: str, count: int, residue: list[str]
) -> None:
    llmux.begin({"alpha": model(alpha), "beta": model(beta)})
    report = llmux.load("turns", f"--count={count}", "--residue", *residue)
    print(f"{alpha} / {beta}: {report}")
    assert report["answers"] == count
    assert report["streams"] == count // 2
    assert report["wrong"] == []


def test_a_crowd_on_three_models_gets_what_it_asked_for(llmux: LlmuxGuest) -> None:
    """10,000 requests unless $LLMUX_CROWD_REQUESTS says otherwise."""
    count = int(os.environ.get("LLMUX_CROWD_REQUESTS", "10000"))
    seed = seed_of("LLMUX_CROWD_SEED")
    speed = {"STANDIN_TOKENS_PER_SEC": "500"}
    models = {name: model(env=speed) for name in ("alpha", "beta", "gamma")}
    llmux.begin(models, policy={"min_active_secs": 0.1, "drain_timeout_secs": 0.3})
    report = llmux.load("crowd", f"--count={count}", f"--seed={seed}")
    print(f"crowd: {report}")
    assert report["wrong"] == []
    assert report["requests"] == count
    assert report["kinds"].get("cut after a stall", 0) <= count // 200
    assert report["switches"] >= count // 200  # a busy model is served for a while before it leaves
    assert set(report["gauges"].values()) == {0}
    assert report["strays"] == []
    assert {"plain", "stream", "abandoned"} <= set(report["kinds"])
