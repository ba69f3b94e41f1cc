"""What an operator sees and orders over HTTP, on the whole embedded daemon."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import Daemon, Start, in_background
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.long

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
OFFLOAD = {"weights": "offload", "process": "keep_running"}
TWO: dict[str, dict[str, Any]] = {
    "alpha": {"eviction": OFFLOAD},
    "beta": {"eviction": OFFLOAD},
}


@pytest.fixture
def two(daemon: Daemon) -> Daemon:
    daemon.set_models(TWO | daemon.models)
    return daemon


def samples(daemon: Daemon) -> dict[str, list[tuple[dict[str, str], float]]]:
    answer = daemon.request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    values = [v for have, v in found.get(name, []) if labels.items() <= have.items()]
    assert len(values) == 1, (name, labels, found.get(name))
    return values[0]


# ---- /control, as the earlier system had it ------------------------------------------------------


def test_status_of_a_model_at_work(two: Daemon) -> None:
    status = two.status()
    assert status["state"] == "idle" or status["state"].startswith("active:")
    assert status["mode"] == {"mode": "auto"}
    assert two.chat("alpha").status == 200
    status = two.status()
    assert status["state"] == "active:alpha" and status["active_model"] == "alpha"
    alpha = status["models"]["alpha"]
    assert alpha["queue_depth"] == 0
    assert alpha["process_state"] == "running"
    # the end of a request reaches the supervisor some milliseconds after its client
    two.until(lambda: two.model("alpha")["in_flight"] == 0)
    two.park("alpha")
    assert two.model("alpha")["process_state"] == "sleeping:Offload+KeepRunning"
    assert two.model("beta")["process_state"] == "not_started"


def test_switch_pin_and_modes(two: Daemon) -> None:
    answer = two.ask("switch", model="alpha")
    assert answer.status == 200 and answer.json() == {"message": "Switched to model: alpha"}
    assert two.ask("mode", mode="manual").status == 200
    assert two.status()["mode"] == {"mode": "manual"}
    answer = two.chat("beta")
    assert answer.status == 503 and answer.json()["error"]["code"] == "manual_mode"
    assert answer.headers["retry-after"] == "30", "it comes when an operator says so"
    assert two.chat("alpha").status == 200, "the active one is served"
    answer = two.ask("pin", model="beta")
    assert answer.json() == {"message": "Pinned to model: beta"}
    assert two.status()["mode"] == {"mode": "manual", "pinned": "beta"}
    assert two.chat("alpha").status == 503 and two.chat("beta").status == 200
    assert two.ask("switch", model="alpha").status == 200, "moves the pin"
    assert two.status()["mode"]["pinned"] == "alpha"
    assert two.ask("unpin").status == 200
    assert two.status()["mode"] == {"mode": "auto"}
    assert two.chat("beta").status == 200


def test_a_pin_that_cannot_be_served_is_rolled_back(two: Daemon) -> None:
    two.order("beta", die_at_start=True)
    answer = two.ask("pin", model="beta")
    assert answer.status == 503 and answer.code == "model_start_failed"
    assert two.status()["mode"] == {"mode": "auto"}


def test_eviction_is_read_and_set(two: Daemon) -> None:
    shown = two.request("GET", "/control/eviction").json()["models"]["alpha"]
    assert shown == {"eviction": OFFLOAD, "process_state": two.model("alpha")["process_state"]}
    other = {"weights": "discard", "process": "keep_running"}
    assert two.ask("eviction", model="alpha", eviction=other).status == 200
    shown = two.request("GET", "/control/eviction").json()["models"]["alpha"]
    assert shown["eviction"] == other
    two.load("alpha")
    two.park("alpha")
    assert two.model("alpha")["parked_as"] == "discard+keep_running"
    assert two.ask("eviction", model="alpha", eviction=OFFLOAD).status == 200


def test_sleep_and_wake_tell_the_truth(two: Daemon) -> None:
    assert two.ask("wake", model="alpha").status == 200
    assert two.ask("sleep", model="alpha", eviction=OFFLOAD).status == 200
    assert two.ask("sleep", model="alpha").status == 200, "again: already so"
    assert two.status()["active_model"] is None, "asleep is not active"
    assert two.ask("wake", model="beta").status == 200
    assert two.ask("wake", model="alpha").status == 200
    serving = [n for n, one in two.status()["models"].items() if one["state"] == "serving"]
    assert serving == ["alpha"], "never two on one GPU"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/control/mode", {"mode": "x"}, 400),
        ("POST", "/control/pin", {"model": "nobody"}, 404),
        ("POST", "/control/switch", {"model": "nobody"}, 404),
        ("POST", "/control/sleep", {"model": "nobody"}, 404),
        ("POST", "/control/wake", {}, 400),
        ("POST", "/control/wake", b"{", 400),
        ("POST", "/control/eviction", {"model": "other", "eviction": {"weights": "x"}}, 400),
        ("POST", "/control/eviction", {"model": "other"}, 400),
        ("GET", "/control/pin", None, 405),
        ("GET", "/control/nothing", None, 404),
        ("GET", "/logs", None, 400),
        ("GET", "/logs/nobody", None, 404),
        ("GET", "/logs/other?lines=0", None, 400),
        ("GET", "/logs/stream/nobody", None, 404),
        ("POST", "/unload", {"model": "nobody"}, 404),
        ("POST", "/unload", {"model": 7}, 400),
        ("POST", "/running", None, 405),
    ],
)
def test_what_cannot_be_done_is_refused(
    daemon: Daemon, method: str, path: str, body: Any, status: int
) -> None:
    answer = daemon.request(method, path, body)
    assert answer.status == status, answer.body
    assert answer.json()["error"]["message"]


# ---- /running, /unload, /logs --------------------------------------------------------------------


def test_running_and_unload(two: Daemon) -> None:
    two.load("alpha")
    two.load("beta")
    running = {r["model"]: r["state"] for r in two.request("GET", "/running").json()["running"]}
    assert running == {"alpha": "parked", "beta": "ready"}
    assert two.request("POST", "/unload", {"model": "alpha"}).json()["models"] == ["alpha"]
    assert two.model("alpha")["state"] == "stopped"
    assert two.request("GET", "/unload").status == 403, "a change of state, without an admin key"
    assert "beta" in two.request("POST", "/unload").json()["models"]
    assert two.request("GET", "/running").json() == {"running": []}
    assert two.memory() == {}


def test_logs_of_an_engine(two: Daemon) -> None:
    two.load("alpha")
    text = two.request("GET", "/logs/alpha?lines=200").body.decode()
    assert "INFO" in text and text.endswith("\n")
    assert len(two.request("GET", "/logs?model=alpha&lines=1").body.splitlines()) == 1


def lines_of(daemon: Daemon, path: str) -> Iterator[str]:
    with daemon.connection() as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        for line in response:
            yield line.decode().rstrip("\n")


def test_logs_are_streamed_as_they_come(two: Daemon) -> None:
    lines = lines_of(two, "/logs/stream/alpha?no-history")
    next(lines)  # it is watched from here on
    loading = in_background(lambda: two.load("alpha"))
    assert any("INFO" in line or "vLLM" in line for line in lines)
    loading.result(20)
    lines.close()  # type: ignore[attr-defined]  # a generator


# ---- /events -------------------------------------------------------------------------------------


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_events_tell_every_transition_with_reason_and_duration(two: Daemon) -> None:
    two.load("alpha")
    lines = lines_of(two, "/events")
    assert next(lines) == ": llmux"
    events = events_of(lines)
    answering = in_background(lambda: two.chat("beta"))
    seen: list[dict[str, Any]] = []
    for event in events:
        seen.append(event)
        if event["type"] == "switch":
            break
    assert answering.result(20).status == 200
    said = [(e["model"], e["from"], e["to"]) for e in seen if e["type"] == "transition"]
    assert said == [
        ("alpha", "serving", "draining"),
        ("alpha", "draining", "parking"),
        ("alpha", "parking", "parked"),
        ("beta", "stopped", "starting"),
        ("beta", "starting", "serving"),
    ]
    assert seen[0]["reason"] == "room for beta"
    assert all(e["duration_secs"] >= 0 for e in seen)
    switch = seen[-1]
    assert switch["model"] == "beta" and switch["victims"] == ["alpha"] and switch["cold"]
    assert switch["duration_secs"] >= switch["up_secs"] > 0
    missed = lines_after(two, seen[-2]["id"])
    assert missed["id"] == switch["id"], "who comes back hears what it missed"


def lines_after(daemon: Daemon, number: int) -> dict[str, Any]:
    with daemon.connection() as connection:
        connection.request("GET", "/events", headers={"Last-Event-ID": str(number)})
        response = connection.getresponse()
        return next(events_of(line.decode().rstrip("\n") for line in response))


def test_a_stop_does_not_wait_for_those_who_watch(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}})
    events, logs = lines_of(daemon, "/events"), lines_of(daemon, "/logs/stream/alpha")
    assert next(events) == ": llmux"
    next(logs)
    assert daemon.stop() == 0
    list(events), list(logs)


# ---- /metrics ------------------------------------------------------------------------------------


def test_metrics_of_requests_switches_and_states(start_daemon: Start) -> None:
    two = start_daemon(TWO)
    before = samples(two)
    assert value(before, "llmux_model_state", model="alpha", state="stopped") == 1
    assert two.chat("alpha").status == 200
    with two.stream("beta", "one two three") as stream:
        while stream.next() is not None:
            pass
    assert two.chat("nobody-" + "x" * 50).status == 404
    found = samples(two)
    assert value(found, "llmux_requests_total", model="alpha", code="200") == 1
    assert value(found, "llmux_requests_total", model="beta", code="200") == 1
    assert not [1 for labels, _ in found["llmux_requests_total"] if "nobody" in labels["model"]]
    for name in ("request_queue_wait_seconds", "time_to_first_token_seconds",
                 "request_duration_seconds"):  # fmt: skip
        assert value(found, f"llmux_{name}_count", model="beta") == 1, name
    assert value(found, "llmux_response_chunks_total", model="beta") >= 1
    assert value(found, "llmux_in_flight", model="beta") == 0
    assert value(found, "llmux_queue_depth", model="beta") == 0
    assert value(found, "llmux_model_state", model="alpha", state="parked") == 1
    assert value(found, "llmux_model_state", model="beta", state="serving") == 1
    assert value(found, "llmux_switches_total", **{"from": "alpha", "to": "beta"}) == 1
    assert value(found, "llmux_switch_total_seconds_count", to="beta", kind="cold") == 1
    assert value(found, "llmux_switch_phase_seconds_count", phase="sleep", to="beta") == 1
    assert value(found, "llmux_step_seconds_count", step="spawn", result="ok") >= 2
    assert value(found, "llmux_supervisor_up") == 1
    assert value(found, "llmux_gateway_workers") == 1
    assert value(found, "llmux_gpu_memory_used_bytes", gpu="0") > 0


def test_engines_own_series_come_along_and_wake_nobody(two: Daemon) -> None:
    two.load("alpha")
    two.load("beta")  # alpha is parked by it
    idle_since = two.model("beta")
    found = samples(two)
    own = found["vllm:num_requests_running"]
    assert [labels["model"] for labels, _ in own] == ["beta"]
    states = {name: one["state"] for name, one in two.status()["models"].items()}
    assert (states["alpha"], states["beta"]) == ("parked", "serving")
    after = two.model("beta")
    assert (after["in_flight"], after["epoch"]) == (0, idle_since["epoch"])
    assert "/metrics" not in found


def test_an_engine_that_writes_nonsense_does_not_hide_the_others(
    start_daemon: Start, tmp_path: Path
) -> None:
    """Prometheus refuses a whole page for one line that it cannot read."""
    nonsense = tmp_path / "nonsense.txt"
    nonsense.write_text(
        'vllm:bad{ 1 2 3 nonsense\nvllm:good{a="\\"} 1\n# TYPE vllm:good what\n\x00'
    )
    both = {"gpu_memory": 0.4, "extra_args": ["--gpu-memory-utilization", "0.4"]}
    evil = both | {"env": {"STANDIN_METRICS_FILE": str(nonsense)}}
    daemon = start_daemon({"evil": evil, "fair": both})
    daemon.load("evil")
    daemon.load("fair")
    found = samples(daemon)
    assert {labels["model"] for labels, _ in found["vllm:num_requests_running"]} == {"evil", "fair"}
    assert "vllm:bad" not in found
    assert value(found, "llmux_engine_samples_dropped", model="evil") == 2
    assert value(found, "llmux_engine_samples_dropped", model="fair") == 0


def test_openmetrics_for_a_client_that_asks(two: Daemon) -> None:
    two.load("alpha")
    with two.connection() as connection:
        connection.request("GET", "/metrics", headers={"accept": OPENMETRICS})
        answer = connection.getresponse()
        text = answer.read().decode()
    assert answer.getheader("content-type", "").startswith(OPENMETRICS)
    found = {family.name: family for family in openmetrics(text)}  # type: ignore[no-untyped-call]
    assert found["llmux_supervisor_connections"].type == "counter"
    assert found["vllm:num_requests_running"].samples[0].labels["model"] == "alpha"


def test_memory_of_gateway_and_supervisor(two: Daemon) -> None:
    """One process in this mode, so both say the same."""
    found = samples(two)
    for prefix in ("", "llmux_supervisor_"):
        assert value(found, f"{prefix}process_resident_memory_bytes") > 10 << 20
        assert value(found, f"{prefix}process_cpu_seconds_total") > 0
        assert value(found, f"{prefix}process_open_fds") > 10


def test_metrics_have_a_port_of_their_own(start_daemon: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    gateway = {"listen": [f"unix:{tmp_path}/h.sock"], "metrics_listen": [f"unix:{path}"]}
    daemon = start_daemon({"alpha": {}}, top={"metrics_port": 9, "gateway": gateway})
    daemon.http = path
    answer = daemon.request("GET", "/metrics")
    assert answer.status == 200 and b"llmux_build_info" in answer.body
    with daemon.connection() as connection:
        connection.request("GET", "/metrics?all", headers={"Accept": OPENMETRICS})
        openly = connection.getresponse()
        assert openly.read().endswith(b"# EOF\n")
    assert openly.getheader("content-type", "").startswith(OPENMETRICS)
    assert daemon.request("GET", "/control/status").status == 404
    assert daemon.request("POST", "/metrics").status == 405
    daemon.http = f"{tmp_path}/h.sock"
    assert daemon.request("GET", "/health").status == 200


# ---- the journal ---------------------------------------------------------------------------------


def test_one_line_a_transition_and_never_a_prompt(daemon: Daemon) -> None:
    """The models' names are this test's own: the log may lag behind the test before."""
    daemon.set_models({"eins": {"eviction": OFFLOAD}, "zwei": {}} | daemon.models)
    secret = "a-prompt-that-nobody-may-read"
    assert daemon.chat("eins", secret).status == 200
    with daemon.stream("zwei", secret) as stream:
        stream.wait_for_token()
    daemon.log.wait("zwei: starting → serving")
    said = daemon.log.since(0)
    assert not [line for line in said if secret in line]
    moves = [line for line in said if re.search(r"<\d>(eins|zwei): \w+ → \w+", line)]
    assert [line.partition(" (")[0].partition(">")[2] for line in moves] == [
        "eins: unknown → stopped",
        "zwei: unknown → stopped",
        "eins: stopped → starting",
        "eins: starting → serving",
        "eins: serving → draining",
        "eins: draining → parking",
        "eins: parking → parked",
        "zwei: stopped → starting",
        "zwei: starting → serving",
    ]


# ---- names with slashes --------------------------------------------------------------------------

SLASHED = "org/Alpha-1.5"


@pytest.mark.parametrize("path", [SLASHED, SLASHED.replace("/", "%2F")])
def test_a_name_with_a_slash_is_a_name_as_any_other(daemon: Daemon, path: str) -> None:
    daemon.set_models({SLASHED: {"eviction": OFFLOAD}} | daemon.models)
    assert daemon.chat(SLASHED).status == 200
    assert daemon.request("GET", f"/upstream/{path}/health").status == 200
    told = daemon.request("GET", f"/v1/models/{path}")
    assert (told.status, told.json()["id"]) == (200, SLASHED)
    logs = daemon.request("GET", f"/logs/{path}?lines=3")
    assert (logs.status, bool(logs.body.strip())) == (200, True)
    assert daemon.request("POST", f"/unload?model={path}").status == 200
    assert daemon.model(SLASHED)["process_state"] == "not_started"
    assert value(samples(daemon), "llmux_model_state", model=SLASHED, state="stopped") == 1
