"""What clients and operators are told, on the whole daemon."""

from __future__ import annotations

import pytest
from daemon_harness import AT_ONCE, Daemon, Start, in_background

pytestmark = pytest.mark.long

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "nobody", "messages": []}', 404, "model_not_found"),
        (b'{"model": "other", ', 400, "invalid_request"),
        (b'{"messages": []}', 400, "invalid_request"),
        (b'{"model": 7}', 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused_at_once(
    daemon: Daemon, body: bytes, status: int, code: str
) -> None:
    answer = daemon.request("POST", CHAT, body)
    assert (answer.status, answer.code) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.seconds < AT_ONCE


def test_every_inference_route_reaches_the_engine(daemon: Daemon) -> None:
    completion = daemon.request("POST", "/v1/completions", {"model": "other", "prompt": "hello"})
    assert completion.text.startswith("other:")
    embedding = daemon.request("POST", "/v1/embeddings", {"model": "other", "input": "hello"})
    assert len(embedding.json()["data"][0]["embedding"]) > 1


def test_health_and_the_list_of_models(daemon: Daemon) -> None:
    assert daemon.request("GET", "/health").status == 200
    assert daemon.request("GET", "/health/ready").json()["supervisor"] == "up"
    assert daemon.listed() == {"other"}
    daemon.load("other")
    daemon.until(lambda: daemon.request("GET", "/v1/models/other").json()["state"] == "serving")


def test_the_status_says_who_serves_and_how_the_rest_is_parked(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {"eviction": "discard+keep_running"}})
    assert daemon.status()["state"] == "idle"
    daemon.load("beta")
    daemon.load("alpha")
    status = daemon.status()
    assert status["state"] == "active:alpha"
    assert status["active_models"] == ["alpha"]
    assert status["mode"] == {"mode": "auto"}
    alpha, beta = status["models"]["alpha"], status["models"]["beta"]
    assert (alpha["state"], alpha["process_state"]) == ("serving", "running")
    assert (beta["state"], beta["parked_as"]) == ("parked", "discard+keep_running")
    assert beta["process_state"] == "sleeping:Discard+KeepRunning"
    assert alpha["in_flight"] == alpha["queue_depth"] == 0
    assert alpha["pid"] in daemon.all_pids()


def test_the_status_shows_a_switch_and_who_waits(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    daemon.order("alpha", tokens_per_sec=30)
    with daemon.stream("alpha", max_tokens=30, min_tokens=30) as stream:
        stream.wait_for_token()
        mark = daemon.log.mark()
        waiting = in_background(lambda: daemon.chat("beta"))
        daemon.log.wait("alpha: serving → draining", since=mark)
        status = daemon.status()
        stream.rest()
    assert status["state"] == "switching:alpha->beta"
    assert status["models"]["alpha"]["in_flight"] == 1
    assert status["models"]["beta"]["queue_depth"] == 1
    assert waiting.result(20).status == 200


def test_systemd_is_told_who_serves(daemon: Daemon) -> None:
    mark = daemon.notified.mark()
    daemon.load("other")
    daemon.notified.wait("STATUS=serving other", since=mark)
    daemon.park("other")
    daemon.notified.wait("STATUS=no model active; 1 parked", since=mark)


def test_a_pinned_model_stays_and_manual_mode_refuses_the_rest(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    assert daemon.ask("pin", model="alpha").status == 200
    assert daemon.chat("alpha").status == 200
    refused = daemon.chat("beta")
    assert (refused.status, refused.code) == (503, "manual_mode")
    assert refused.seconds < AT_ONCE
    assert daemon.ask("unpin").status == 200
    assert daemon.chat("beta").status == 200


def test_in_manual_mode_an_operator_switches(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}, "beta": {}})
    daemon.load("alpha")
    assert daemon.ask("mode", mode="manual").status == 200
    assert daemon.chat("beta").code == "manual_mode"
    assert daemon.ask("switch", model="beta").status == 200
    assert daemon.chat("beta").status == 200
    assert daemon.chat("alpha").code == "manual_mode"


def test_an_eviction_set_at_run_time_is_how_the_model_parks(daemon: Daemon) -> None:
    daemon.set_models({"alpha": {}})
    daemon.load("alpha")
    assert daemon.ask("eviction", model="alpha", eviction="retain+stop").status == 200
    assert daemon.model("alpha")["eviction"] == "retain+stop"
    daemon.park("alpha")
    assert daemon.model("alpha")["state"] == "stopped"
    bad = daemon.ask("eviction", model="alpha", eviction="retain+nothing")
    assert (bad.status, bad.code) == (400, "invalid_request")


def test_who_waits_too_long_gets_a_504(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}, "other": {}}, policy={"request_timeout_secs": 0.3})
    daemon.load("other")
    daemon.order("alpha", startup_secs=60)
    answer = daemon.chat("alpha")
    assert (answer.status, answer.code) == (504, "wait_expired")
    assert 0.3 <= answer.seconds < AT_ONCE
    assert "request_timeout_secs" in answer.message
