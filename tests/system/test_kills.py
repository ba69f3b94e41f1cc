"""Whatever dies, whenever: engines stay, requests are answered, nothing is left behind."""

from __future__ import annotations

import secrets

import pytest
from llmux_guest import LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SPEED = {"STANDIN_TOKENS_PER_SEC": "100"}  # a stream takes 0.3 s, as long as a few switches


@pytest.mark.parametrize(
    ("eviction", "blows"),
    [
        ("offload+keep_running", ["kill supervisor*10"]),
        ("offload+keep_running", ["kill gateway*10"]),
        ("discard+freeze", ["kill supervisor*3", "kill gateway*3", "kill both*3"]),
        ("offload+keep_running", ["restart supervisor*3", "restart gateway*3", "restart both*2"]),
    ],
    ids=["supervisor", "gateway", "frozen", "restarts"],
)
def test_blows_at_random_moments_under_load(
    llmux: LlmuxGuest, eviction: str, blows: list[str], request: pytest.FixtureRequest
) -> None:
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    llmux.begin({name: model(eviction, env=SPEED) for name in ("alpha", "beta")})
    report = llmux.load("storm", f"--seed={seed}", *blows)
    print(f"{request.node.name}: {report}")
    assert report["wrong"] == [], llmux.journal()
    assert report["failed"] == [], llmux.journal(lines=200)
    assert report["stuck"] == 0
    assert report["refused_connections"] == 0
    assert report["blows"] == sum(int(blow.rpartition("*")[2]) for blow in blows)
