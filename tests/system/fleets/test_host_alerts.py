"""The alerts of what only a host with systemd has, each fired by its fault in a guest."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fleet import fleet
from llmux_guest import STANDIN, SUPERVISOR, LlmuxGuest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "front"))

from front_rig import until
from prometheus_rig import Prometheus, prometheus, with_minutes_of

IMAGES = "/var/lib/llmux/checkpoints"
# The rule has 20 s, which are no minutes that a test may shorten.
AWAY_SECS = 120
MINUTE = float(os.environ.get("LLMUX_ALERT_MINUTE", "1"))

pytestmark = [
    pytest.mark.system,
    pytest.mark.fleet,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start guests with ssh"),
    pytest.mark.timeout(1200 + 60 * MINUTE),
]


@dataclass
class Watched:
    host: LlmuxGuest
    prometheus: Prometheus


def configure(host: LlmuxGuest, **checkpoint: Any) -> None:
    model = {"model_path": "lab/tiny", "eviction": "discard+checkpoint"}
    host.configure(
        {"alpha": model},
        vllm_command=[STANDIN],
        engine_user="root",  # in a container CRIU cannot dump the processes of another user
        gateway={"listen": ["0.0.0.0:3000"], "allow_public_without_keys": True},
        checkpoint=checkpoint,
    )


@pytest.fixture(scope="module")
def watched(package: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("watched")
    with fleet({"one": "trixie"}, directory, {}, [package]) as hosts:
        host = LlmuxGuest(hosts.guests["one"])
        configure(host)
        host.run(["systemctl", "start", "llmux"])
        assert not host.ask("alpha")["error"]
        # Not before: a host that is started slowly is rightly called unreachable.
        targets = {"llmux": [("one", f"{hosts.addresses['one']}:3000")], "haproxy": [], "node": []}
        with prometheus(directory, targets, with_minutes_of(MINUTE)) as running:
            until(lambda: running.query("up == 1"), "a scrape of llmux")
            assert running.fired() == {}
            yield Watched(host, running)


def test_a_supervisor_that_is_away_is_reported(watched: Watched) -> None:
    # what systemd does with a supervisor that died is start another one; the gateway goes on
    watched.host.run(["systemctl", "stop", SUPERVISOR])
    try:
        watched.prometheus.until_fired({"LlmuxSupervisorAway"}, AWAY_SECS)
    finally:
        watched.host.run(["systemctl", "start", SUPERVISOR])
    assert "LlmuxUnreachable" not in watched.prometheus.fired()


def test_a_supervisor_that_is_stopped_is_reported(watched: Watched) -> None:
    """Its connections stay; systemd's watchdog ends it after half a minute to a minute."""
    watched.prometheus.until_firing("LlmuxSupervisorAway", 30 + 10 * MINUTE, wanted=False)
    watched.host.run(["systemctl", "kill", "--kill-whom=main", "--signal=STOP", SUPERVISOR])
    try:
        watched.prometheus.until_firing("LlmuxSupervisorAway", AWAY_SECS)
    finally:
        watched.host.run(["systemctl", "kill", "--kill-whom=main", "--signal=CONT", SUPERVISOR])
    assert "LlmuxUnreachable" not in watched.prometheus.fired()


def test_a_budget_of_images_that_is_nearly_used_is_reported(watched: Watched) -> None:
    watched.host.run(["llmux", "checkpoint", "alpha"])
    rows = json.loads(watched.host.run(["llmux", "checkpoint", "--list", "--json"]).stdout)
    configure(watched.host, max_bytes=int(rows[0]["disk_bytes"] * 1.05))
    watched.host.run(["systemctl", "restart", SUPERVISOR])
    watched.prometheus.until_fired({"LlmuxImageBudget"}, 30 + 10 * MINUTE)


def test_an_image_in_quarantine_is_reported(watched: Watched) -> None:
    configure(watched.host)
    watched.host.run(["systemctl", "restart", SUPERVISOR])
    watched.host.run(["llmux", "checkpoint", "alpha"])
    damage = f"printf x | dd of=$(ls {IMAGES}/alpha/images/pages-*.img | head -n 1) conv=notrunc"
    watched.host.run(["sh", "-c", damage])
    assert not watched.host.ask("alpha")["error"], "it is started cold instead"
    watched.prometheus.until_fired({"LlmuxImageQuarantined"}, 30 + 5 * MINUTE)
