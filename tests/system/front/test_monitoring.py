"""What the role llmux_monitoring installs: alerts under promtool, and every query of the dashboard
in a Prometheus that scraped llmux, the proxy and a host."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Iterator

import pytest
import yaml
from front_programs import ROOT, need
from front_rig import Proxy, free_port, hosts, proxy, until
from front_trace import send, trace
from prometheus_rig import ROLE, RULES, Prometheus, ended, promtool
from prometheus_rig import prometheus as running

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

RULES_TEST = ROOT / "tests/fixtures/monitoring/llmux.rules.test.yml"
DASHBOARD = ROLE / "files/llmux-dashboard.json"
MODELS = ["m0", "m1", "m2", "m3"]  # two at home on each host, of which one fits


# ---- alerts -------------------------------------------------------------------------------------


def test_each_alert_fires_on_its_fault_and_not_in_an_hour_of_normal_load() -> None:
    promtool("test", "rules", str(RULES_TEST))


# ---- the dashboard ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped two hosts, their proxy and this machine under some load."""
    directory = tmp_path_factory.mktemp("monitoring")
    node = free_port()
    exporter = need("prometheus-node-exporter", "prometheus-node-exporter")
    model = {"extra_args": ["--gpu-memory-utilization", "0.6"]}
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(
            hosts(
                directory,
                2,
                MODELS,
                model=model,
                policy={"min_active_secs": 0},
                checkpoint={"max_bytes": "1GiB"},
            )
        )
        front = stack.enter_context(proxy(directory, fleet))
        stack.enter_context(
            ended(
                exporter,
                f"--web.listen-address=127.0.0.1:{node}",
                "--collector.disable-defaults",
                "--collector.meminfo",
                log=directory / "node.log",
            )
        )
        targets = {
            "llmux": [(host.name, f"127.0.0.1:{host.port}") for host in fleet],
            "haproxy": [("front", f"127.0.0.1:{front.metrics_port}")],
            "node": [(host.name, f"127.0.0.1:{node}") for host in fleet],
        }
        prometheus = stack.enter_context(running(directory, targets))
        with under_load(front):
            # rate() wants two scrapes of what the load counts.
            ready = "count(count by (host) (rate(llmux_switch_phase_seconds_sum[20s]) > 0)) == 2"
            until(lambda: prometheus.query(ready), "two scrapes of hosts that switch")
            yield prometheus


@contextlib.contextmanager
def under_load(front: Proxy) -> Iterator[None]:
    over = threading.Event()

    def load() -> None:
        seed = 0
        while not over.is_set():
            seed += 1
            small = [one for one in trace(MODELS, 12, seed=seed) if one.size < 100_000]
            send(front.port, small, clients=2)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def queries() -> list[tuple[str, str]]:
    """(panel, expression), with Grafana's variables as for "all"."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "20s")
            expression = expression.replace("$host", ".*").replace("$model", ".*")
            assert "$" not in expression, expression
            found.append((panel["title"], expression))
    assert len(found) > 25
    return found


# An embedded llmux makes no images.
WITHOUT_SYSTEMD = {"llmux_image_bytes"}


def test_every_query_of_the_dashboard_has_data(watched: Prometheus) -> None:
    for panel, expression in queries():
        rows = watched.query(expression)
        if not rows and not any(name in expression for name in WITHOUT_SYSTEMD):
            # Some show what comes and goes with the load, or rates over the last seconds.
            rows = until(functools.partial(watched.query, expression), f"{panel}: {expression}")
        print(f"{len(rows):4} {panel}: {' '.join(expression.split())[:120]}")


def test_the_dashboards_variables_find_hosts_and_models(watched: Prometheus) -> None:
    assert {row["metric"]["host"] for row in watched.query("llmux_build_info")} == {"gpu1", "gpu2"}
    assert {row["metric"]["model"] for row in watched.query("llmux_model_state")} == set(MODELS)


def test_every_series_of_an_alert_is_there_and_none_fires_under_load(watched: Prometheus) -> None:
    rules = watched.rules()
    assert len(rules) == 14
    assert all(rule["health"] != "err" for rule in rules), rules
    firing = [rule["name"] for rule in rules if rule["state"] == "firing"]
    assert not firing
    for name in series_of_alerts() - WITHOUT_SYSTEMD:
        assert watched.query(f"count({name})"), name


def series_of_alerts() -> set[str]:
    text = " ".join(
        str(rule["expr"])
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    )
    return set(re.findall(r"\b(?:llmux|haproxy)_[a-z_]+", text))
