"""Whatever dies, whenever: engines stay, requests are answered, nothing is left behind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llmux_guest import GPU, STANDIN, LlmuxGuest, model

from tests.seeds import seed_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SPEED = {"STANDIN_TOKENS_PER_SEC": "200"}  # a stream takes 0.15 s, as long as two switches


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
    seed = seed_of("LLMUX_STORM_SEED")
    llmux.begin({name: model(eviction, env=SPEED) for name in ("alpha", "beta")})
    report = llmux.load("kills/storm", f"--seed={seed}", *blows)
    print(f"{request.node.name}: {report}")
    assert report["wrong"] == [], llmux.journal()
    assert report["failed"] == [], llmux.journal(lines=200)
    assert report["stuck"] == 0
    assert report["refused_connections"] == 0
    assert report["blows"] == sum(int(blow.rpartition("*")[2]) for blow in blows)


@pytest.mark.parametrize(
    ("moment", "eviction", "faults"),
    [
        ("starting", "offload+keep_running", {"startup_secs": 1.0}),
        ("parking", "offload+keep_running", {"slow_sleep_secs": 1.0}),
        ("freezing", "offload+freeze", {"slow_sleep_secs": 1.0}),
        ("waking", "discard+freeze", {"slow_wake_secs": 0.5}),
        ("ending", "retain+stop", {"ignore_sigterm": True}),
        ("stopping", "offload+keep_running", {"ignore_sigterm": True}),
    ],
)
def test_a_supervisor_killed_in_an_operation_is_succeeded_by_one_that_finishes_it(
    llmux: LlmuxGuest, moment: str, eviction: str, faults: dict[str, Any]
) -> None:
    settings = {"STANDIN_FAULTS": f"{GPU}/alpha.faults"}
    llmux.begin(
        {
            "alpha": model(eviction, env=settings, stop_grace_secs=1),
            "beta": model("offload+keep_running"),
        }
    )
    report = llmux.load("kills/moment", moment, json.dumps(faults))
    print(f"killed while {moment}: {report}")
    assert report["wrong"] == [], llmux.journal()


def test_an_engine_that_left_its_cgroup_is_ended_before_the_next_one_starts(
    llmux: LlmuxGuest,
) -> None:
    """As a container runtime moves its containers; only one that runs as root can."""
    elsewhere, command = "/sys/fs/cgroup/elsewhere", "/var/tmp/leave"
    leave = f"mkdir -p {elsewhere}\necho $$ >{elsewhere}/cgroup.procs"
    llmux.guest.write(command, f'#!/bin/sh\n{leave}\nexec {STANDIN} "$@"\n', mode=0o755)
    stubborn = {"extra_args": ["--standin-fault", "ignore_sigterm=true"], "stop_grace_secs": 1}
    llmux.begin(
        {
            "alpha": model("retain+stop", vllm_command=[command], **stubborn),
            "beta": model("retain+stop"),
        },
        engine_user="root",
    )
    for name in ("alpha", "beta"):
        assert llmux.ask(name)["error"] == "", llmux.journal()
    assert llmux.run(["cat", f"{elsewhere}/cgroup.procs"]).stdout == "", llmux.journal()
    assert "llmux-alpha.scope left its cgroup for /elsewhere" in llmux.journal(lines=200)
    llmux.run(["rmdir", elsewhere])
