"""Which models stay, leave and come without a request for them: preload, exclusive, fallback, idle
timeouts, the request's own hint, priorities and never_evict."""

from __future__ import annotations

import json

import pytest
from daemon_harness import SECONDS, Daemon, Start, chat_body, in_background

pytestmark = pytest.mark.long

SMALL = {"gpu_memory": 0.3, "extra_args": ["--gpu-memory-utilization", "0.3"]}


def state(daemon: Daemon, model: str) -> str:
    return str(daemon.model(model)["state"])


def test_residence_as_configured(start_daemon: Start) -> None:
    daemon = start_daemon(
        {name: dict(SMALL) for name in ("alpha", "beta", "gamma")},
        top={
            "preload": ["alpha", "gamma"],
            "exclusive": [["alpha", "beta"]],
            "gateway": {"fallback_model": "gamma"},
        },
    )
    daemon.until(lambda: set(daemon.status()["active_models"]) == {"alpha", "gamma"})
    assert daemon.chat("beta").status == 200
    assert set(daemon.status()["active_models"]) == {"beta", "gamma"}, "room for all three"
    answer = daemon.chat("gpt-9")
    assert answer.json()["model"] == "gpt-9"
    assert answer.text.startswith("gamma:")

    with daemon.connection() as connection:
        body = json.dumps(chat_body("gamma", "bye"))
        headers = {"X-Llmux-Keep-Alive": "0"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        assert connection.getresponse().status == 200
    daemon.until(lambda: state(daemon, "gamma") == "parked")
    assert state(daemon, "beta") == "serving"


def test_an_idle_model_is_parked_and_one_that_is_never_evicted_stays(daemon: Daemon) -> None:
    daemon.set_models(
        {"alpha": dict(SMALL), "beta": {**SMALL, "never_evict": True}, "big": {}},
        idle_timeout_secs=0.2,
    )
    daemon.load("beta")
    assert daemon.chat("alpha").status == 200
    daemon.until(lambda: state(daemon, "alpha") == "parked")
    assert state(daemon, "beta") == "serving"
    big = in_background(lambda: daemon.chat("big"))
    daemon.until(lambda: daemon.model("big")["queue_depth"] == 1)
    assert state(daemon, "beta") == "serving", "it makes no room for big"
    daemon.park("beta")
    assert big.result(SECONDS).status == 200
