"""Each alert fires on its fault: real hosts, engines, proxy and Prometheus, and a fault made.

Prometheus runs the role's rules with a minute as a second, else this would take hours;
``LLMUX_ALERT_MINUTE=60`` takes them as they are: one hour of load, four hours of faults. What needs
systemd (supervisor, images) is in ``fleets/test_host_alerts.py``.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from front_programs import ROOT
from front_rig import SECONDS, Host, Proxy, hosts, proxy, until
from prometheus_rig import Prometheus, prometheus, with_minutes_of

sys.path.insert(0, str(ROOT / "tests/standin"))

from ledger import Ledger, find_start_time
from vllm_standin import faults

MINUTE = float(os.environ.get("LLMUX_ALERT_MINUTE", "1"))
MODELS = ["steady", "slow", "dies", "broken", "stuck"]
BOUND_SECS = 3.0  # policy.max_wait_secs; twice that is too long
LONGEST = SECONDS + 60 * MINUTE
SLOW_SECS = 15  # a start of the slow model, later

pytestmark = [pytest.mark.system, pytest.mark.fleet, pytest.mark.timeout(400 + 300 * MINUTE)]


@dataclass
class Lab:
    directory: Path
    one: Host
    two: Host
    front: Proxy
    prometheus: Prometheus

    def order(self, path: str, **values: Any) -> int:
        """An operator's order, by the first host's own socket; the status."""
        connection = http.client.HTTPConnection("localhost", timeout=LONGEST)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(LONGEST)
        connection.sock.connect(str(self.one.orders))
        body = json.dumps(values)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    def fault(self, model: str, **orders: Any) -> None:
        faults.order(self.directory / f"{model}.faults", **orders)

    def pid(self, model: str) -> int:
        models = json.loads(self.one.get("/control/status")[1])["models"]
        return int(models[model]["pid"])

    def ask(self, port: int, model: str) -> int:
        body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 2})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    each = {name: {"env": {"STANDIN_FAULTS": str(tmp_path / f"{name}.faults")}} for name in MODELS}
    model = {"gpu_memory": 0.15, "eviction": "retain+stop"}
    policy = {"min_active_secs": 0, "max_wait_secs": BOUND_SECS}
    with ExitStack() as stack:
        one, two = fleet = stack.enter_context(
            hosts(tmp_path, 2, MODELS, model=model, each=each, policy=policy)
        )
        front = stack.enter_context(proxy(tmp_path, fleet))
        targets = {
            "llmux": [(host.name, f"127.0.0.1:{host.port}") for host in fleet],
            "haproxy": [("front", f"127.0.0.1:{front.metrics_port}")],
            "node": [],
        }
        watching = stack.enter_context(prometheus(tmp_path, targets, with_minutes_of(MINUTE)))
        yield Lab(tmp_path, one, two, front, watching)


def test_an_hour_of_normal_load_fires_nothing(lab: Lab) -> None:
    rounds = normal_load(lab, 60 * MINUTE)
    assert lab.prometheus.fired() == {}
    rules = lab.prometheus.rules()
    print(f"{rounds} rounds of load, {len(rules)} rules, none fired")
    assert {rule["health"] for rule in rules} == {"ok"}


def test_each_alert_fires_on_its_fault_and_none_before(lab: Lab) -> None:
    normal_load(lab, 45 * MINUTE)
    assert lab.prometheus.fired() == {}
    lab.front.order("set server llmux/gpu1 state drain")
    lab.two.kill()
    with Stranger(lab):
        fail_to_start(lab)
        kill_engines(lab)
        start_slowly(lab)
        fired = lab.prometheus.until_fired(
            {
                "LlmuxUnreachable",
                "LlmuxHostDown",
                "LlmuxModelFailed",
                "LlmuxModelKeepsFailing",
                "LlmuxEnginesDie",
                "LlmuxStartSlow",
                "LlmuxWaitTooLong",
                "LlmuxGpuMemoryOfOthers",
            },
            30 + 15 * MINUTE,
        )
    assert one(fired, "LlmuxUnreachable", "host") == one(fired, "LlmuxHostDown", "server") == "gpu2"
    # an engine that dies again and again is a model that fails, too
    assert of(fired, "LlmuxModelFailed", "model") <= {"broken", "dies"}
    assert "broken" in of(fired, "LlmuxModelKeepsFailing", "model")
    assert one(fired, "LlmuxEnginesDie", "model") == "dies"
    assert one(fired, "LlmuxStartSlow", "to") == one(fired, "LlmuxWaitTooLong", "model") == "slow"
    assert set(fired) & {"LlmuxGpuUnseen", "LlmuxHostLeftDrained"} == set()
    with never_started(lab):
        lab.prometheus.until_fired({"LlmuxQueueStuck"}, 30 + 25 * MINUTE, model="stuck")
    fired = lab.prometheus.until_fired({"LlmuxHostLeftDrained"}, 30 + 130 * MINUTE)
    assert one(fired, "LlmuxHostLeftDrained", "server") == "gpu1"
    (lab.one.directory / "gpu1/gpu.json").write_text("not a ledger")
    lab.prometheus.until_fired({"LlmuxGpuUnseen"}, 30 + 10 * MINUTE)


def of(fired: dict[str, list[dict[str, Any]]], rule: str, label: str) -> set[str]:
    return {labels[label] for labels in fired[rule]}


def one(fired: dict[str, list[dict[str, Any]]], rule: str, label: str) -> str:
    (value,) = of(fired, rule, label)
    return value


def fail_to_start(lab: Lab) -> None:
    lab.fault("broken", die_at_start=True)
    for _ in range(3):
        assert lab.order("/control/wake", model="broken") == 503


def kill_engines(lab: Lab) -> None:
    for _ in range(4):
        assert lab.order("/control/wake", model="dies") == 200
        os.kill(lab.pid("dies"), signal.SIGKILL)
        until(lambda: lab.one.states()["dies"] != "serving", "the engine's death is noticed")


def start_slowly(lab: Lab) -> None:
    lab.fault("slow", startup_secs=SLOW_SECS)
    lab.order("/unload", model="slow")
    for status in ThreadPoolExecutor(5).map(lambda _: lab.ask(lab.one.port, "slow"), range(5)):
        assert status == 200


@contextmanager
def never_started(lab: Lab) -> Iterator[None]:
    """A request waits for a model that does not come up; its start is given up in the end."""
    lab.fault("stuck", never_healthy=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.ask, lab.one.port, "stuck")
        try:
            yield
        finally:
            lab.order("/unload", model="stuck")
            assert waiting.result() == 503


def normal_load(lab: Lab, seconds: float) -> int:
    """Through the front end, with cold starts on both hosts; how many rounds of it."""
    ends, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        rounds += 1
        for name in ("steady", "slow", "dies"):
            assert lab.ask(lab.front.port, name) == 200
            assert lab.ask(lab.one.port, name) == 200
        lab.order("/unload", model="slow")
        until(lambda: lab.front.weights()["slow"]["gpu1"] != "100", "the proxy hears of it")
        time.sleep(MINUTE / 10)  # the load's pace: an hour that is one is no flood
    return rounds


class Stranger:
    """A process that is not llmux's and holds 2 GiB of the first host's GPU."""

    def __init__(self, lab: Lab) -> None:
        self._ledger = Ledger(str(lab.one.directory / "gpu1/gpu.json"))

    def __enter__(self) -> None:
        self._process = subprocess.Popen(["sleep", "infinity"])
        start = find_start_time(self._process.pid)
        assert start is not None
        self._ledger.allocate(0, self._process.pid, start, "stranger", {"weights": 2 << 30})

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
