"""The durations of the alerts as they are, at the role's own scrape interval, under promtool: each
waits as long as its ``for`` says and no longer, and an hour with all that is normal is quiet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_rig import ROLE, RULES, promtool

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

STEP = 15  # seconds: llmux_monitoring_scrape_interval
BEGIN = 600  # when a fault begins
HOUR = 3600
Value = Callable[[int], float]  # of a series, by the seconds since a fault's begin

# What is measured of host "a".
UP = 'up{job="llmux", instance="a"}'
SILENT = 'llmux_supervisor_silent_seconds{instance="a"}'
FAILED = 'llmux_model_state{instance="a", model="m", state="failed"}'
FAILURES = 'llmux_model_failures{instance="a", model="m"}'
DEATHS = 'llmux_engine_deaths_total{instance="a", model="m"}'
SWITCH_SUM = 'llmux_switch_total_seconds_sum{instance="a", to="m", kind="wake"}'
SWITCH_COUNT = 'llmux_switch_total_seconds_count{instance="a", to="m", kind="wake"}'
WAITED_20 = 'llmux_request_queue_wait_seconds_bucket{instance="a", model="m", le="20.0"}'
WAITED_60 = 'llmux_request_queue_wait_seconds_bucket{instance="a", model="m", le="60.0"}'
WAITED = 'llmux_request_queue_wait_seconds_bucket{instance="a", model="m", le="+Inf"}'
BOUND = 'llmux_max_wait_seconds{instance="a"}'
QUEUE = 'llmux_queue_depth{instance="a", model="m"}'
IN_FLIGHT = 'llmux_in_flight{instance="a", model="m"}'
SERVED = 'llmux_requests_total{instance="a", model="m", code="200"}'
QUARANTINED = 'llmux_images_quarantined_total{instance="a", model="m"}'
IMAGES = 'llmux_image_bytes{instance="a", model="m"}'
BUDGET = 'llmux_images_budget_bytes{instance="a"}'
GPU_USED = 'llmux_gpu_memory_used_bytes{instance="a", gpu="0"}'
GPU_OWN = 'llmux_gpu_memory_engines_bytes{instance="a", gpu="0"}'
GPU_SEEN = 'llmux_gpu_observed{instance="a"}'
DOWN = 'haproxy_server_status{proxy="llmux", server="a", state="DOWN"}'
DRAIN = 'haproxy_server_status{proxy="llmux", server="a", state="DRAIN"}'


def always(value: float) -> Value:
    return lambda _: value


def counter(per_minute: float) -> Value:
    return lambda t: (t + BEGIN) * per_minute / 60


def then(before: float, after: float) -> Value:
    return lambda t: before if t < 0 else after


def normal() -> dict[str, Value]:
    return {
        UP: always(1),
        SILENT: lambda t: t // STEP % 6,
        FAILED: always(0),
        FAILURES: always(0),
        DEATHS: always(0),
        SWITCH_SUM: counter(8),
        SWITCH_COUNT: counter(4),
        WAITED_20: counter(100),
        WAITED_60: counter(100),
        WAITED: counter(100),
        BOUND: always(15),
        QUEUE: always(5),
        IN_FLIGHT: always(8),
        SERVED: counter(100),
        QUARANTINED: always(0),
        IMAGES: always(800),
        BUDGET: always(1000),
        GPU_USED: always(70e9),
        GPU_OWN: always(69.9e9),
        GPU_SEEN: always(1),
        DOWN: always(0),
        DRAIN: always(0),
    }


# Of each alert with a ``for``, what its fault changes. The condition holds from the first or second
# scrape after it.
FAULTS: Mapping[str, Mapping[str, Value]] = {
    "LlmuxUnreachable": {UP: then(1, 0)},
    "LlmuxModelFailed": {FAILED: then(0, 1)},
    "LlmuxWaitTooLong": {  # no request before; then every one waits for longer than 20 s
        WAITED_20: always(0),
        WAITED_60: lambda t: max(0, t),
        WAITED: lambda t: max(0, t),
    },
    "LlmuxQueueStuck": {IN_FLIGHT: then(8, 0), SERVED: always(100)},  # long streams, then nothing
    "LlmuxImageBudget": {IMAGES: then(800, 950)},
    "LlmuxGpuMemoryOfOthers": {GPU_USED: then(70e9, 80e9)},
    "LlmuxGpuUnseen": {GPU_SEEN: then(1, 0)},
    "LlmuxHostDown": {DOWN: then(0, 1)},
    "LlmuxHostLeftDrained": {DRAIN: then(0, 1)},
}


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(\d+)([smhd])", duration)
    assert found is not None, duration
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def series(values: Mapping[str, Value], length: int) -> list[dict[str, str]]:
    times = range(-BEGIN, length - BEGIN + STEP, STEP)
    return [
        {"series": name, "values": " ".join(f"{value(t):g}" for t in times)}
        for name, value in values.items()
    ]


def checked(directory: Path, *tests: dict[str, Any]) -> None:
    document = {"rule_files": [str(RULES)], "evaluation_interval": f"{STEP}s", "tests": tests}
    path = directory / "times.json"
    path.write_text(json.dumps(document))
    promtool("test", "rules", str(path))


def firing(at: int, *alerts: str) -> dict[str, Any]:
    """Those, and no others, at ``at`` seconds of the test."""
    return {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": f"{at}s",
        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts],
    }


def test_the_interval_is_the_roles() -> None:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    assert seconds(defaults["llmux_monitoring_scrape_interval"]) == STEP


@pytest.mark.parametrize("rule", [r for r in rules() if "for" in r], ids=lambda r: r["alert"])
def test_an_alert_waits_as_long_as_it_says(tmp_path: Path, rule: dict[str, Any]) -> None:
    name, waits = rule["alert"], seconds(rule["for"])
    length = BEGIN + waits + 120
    values = normal() | dict(FAULTS[name])
    test = {
        "interval": f"{STEP}s",
        "input_series": series(values, length),
        "promql_expr_test": [
            firing(BEGIN + waits - STEP),
            firing(BEGIN + waits + 3 * STEP, name),
        ],
    }
    checked(tmp_path, test)


# ---- what is normal ------------------------------------------------------------------------------


def during(usual: Value, other: float, since: int, secs: int) -> Value:
    """``other`` for ``secs`` seconds from ``since``, both of the hour."""
    return lambda t: other if since <= t + BEGIN < since + secs else usual(t)


def an_hour() -> dict[str, Value]:
    """With all that happens on a good day: a restart, a host that boots, a roll, a cold start that
    failed once, a queue behind a switch, images that are made, a monitor that looks at the GPU."""
    values = normal()
    for name, other, since, secs in (
        (UP, 0, 300, 45),
        (SILENT, 15, 630, STEP),
        (FAILED, 1, 900, 45),
        (FAILURES, 1, 900, 300),
        (DEATHS, 1, 915, 2 * HOUR),
        (IN_FLIGHT, 0, 1200, 840),
        (IMAGES, 950, 1500, 240),
        (GPU_USED, 72e9, 1800, 240),
        (GPU_SEEN, 0, 2100, 240),
        (DOWN, 1, 2400, 45),
        (DRAIN, 1, 600, 2400),
    ):
        values[name] = during(values[name], other, since, secs)
    # A switch that takes twice as long as the others, and a burst of which few wait long.
    values[SWITCH_SUM] = lambda t: counter(8)(t) + (2 if t > BEGIN else 0)
    values[WAITED_20] = lambda t: counter(100)(t) - max(0, min(t, 300)) / 18
    # Nothing ends while nothing runs.
    values[SERVED] = lambda t: counter(100)(t - max(0, min(t + BEGIN - 1200, 840)))
    return values


def test_an_hour_of_normal_load_is_quiet(tmp_path: Path) -> None:
    test = {
        "interval": f"{STEP}s",
        "input_series": series(an_hour(), HOUR),
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[1h]))',
                "eval_time": "1h",
                "exp_samples": [],
            }
        ],
    }
    checked(tmp_path, test)


def test_a_model_that_serves_between_scrapes_is_not_stuck(tmp_path: Path) -> None:
    """Whose few short requests wait for a switch each: no scrape need ever see one in flight."""
    test = {
        "interval": f"{STEP}s",
        "input_series": series(normal() | {IN_FLIGHT: always(0), SERVED: counter(1)}, HOUR),
        "promql_expr_test": [firing(at) for at in range(BEGIN, HOUR, 300)],
    }
    checked(tmp_path, test)


def test_a_supervisor_that_hangs_is_reported_again_and_again(tmp_path: Path) -> None:
    """The watchdog kills it after 30 to 60 s, so that it is never away for long."""
    values = normal() | {SILENT: lambda t: t % 300 if t >= 0 and t % 300 <= 45 else 4}
    away = "LlmuxSupervisorAway"
    reported = [firing(BEGIN + t, away) for t in (30, 299, 899)]
    test = {
        "interval": f"{STEP}s",
        "input_series": series(values, BEGIN + 900),
        "promql_expr_test": [firing(BEGIN + 15), *reported],
    }
    checked(tmp_path, test)
