"""The simulator against llmux itself: ten models on four simulated GPUs, the same trace for both.

The simulator is given what the journal says that the switches took. Meanwhile the GPUs' ledger is
looked at whenever it changes: no GPU holds more than it has, no engine complains of another's
memory, and models live where the simulator has them. $LLMUX_SIM_REQUESTS requests, else 150.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
from typing import Any

import pytest
from llmux_guest import LlmuxGuest, model

from llmux.config.load import load_config
from llmux.sim.journal import read_journal
from llmux.sim.report import quantile
from llmux.sim.trace import Arrival
from llmux.sim.world import Result, Simulation

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

GPUS = 4
SPEED = 20  # tokens per second of each answer
RATE = 6.0  # requests per second of all models together
ENGINE = {
    "STANDIN_TOKENS_PER_SEC": str(SPEED),
    "STANDIN_STARTUP_SECS": "1",
    "STANDIN_SLEEP_SECS": "0.5",
    "STANDIN_WAKE_SECS": "1",
    "STANDIN_DEVICE_CHECKS": "1",
}
PROGRAM = "/srv/llmux/tests/system/sim/replay.py"
TRACE = "/var/tmp/trace.json"


def models() -> dict[str, dict[str, Any]]:
    """Two over two GPUs each, three small ones that share a GPU, five that take one each."""
    wide: dict[str, Any] = {"gpus": 2, "extra_args": ["--tensor-parallel-size", "2"]}
    found = {f"wide{n}": model(env=ENGINE, **wide) for n in range(2)}
    found |= {f"small{n}": model(env=ENGINE, gpus=[3], gpu_memory=0.3) for n in range(3)}
    return found | {f"one{n}": model(env=ENGINE, gpus=1) for n in range(5)}


def trace_of(names: list[str], count: int) -> list[tuple[float, str, int]]:
    rng = random.Random(15)
    at, rows = 0.0, []
    for _ in range(count):
        at += rng.expovariate(RATE)
        name = rng.choices(names, [1 / rank for rank in range(1, len(names) + 1)])[0]
        rows.append((round(at, 3), name, rng.randint(2, 40)))
    return rows


def placements(result: Result) -> dict[str, dict[tuple[int, ...], float]]:
    """Model → on which GPUs for how many seconds."""
    found: dict[str, dict[tuple[int, ...], float]] = {}
    for span in result.spans:
        seconds = found.setdefault(span.model, {})
        seconds[span.gpus] = seconds.get(span.gpus, 0.0) + span.ended - span.began
    return found


def check_places(
    configured: dict[str, dict[str, Any]],
    seen: dict[str, dict[str, float]],
    simulated: dict[str, dict[tuple[int, ...], float]],
) -> None:
    """Each model held memory on as many GPUs as it is to have and on those that it names; and most
    models lived where the simulator had them. A few do not: who comes first on an empty GPU may be
    a matter of milliseconds."""
    alike = 0
    for name, settings in configured.items():
        measured = {tuple(map(int, on.split(","))): secs for on, secs in seen[name].items()}
        print(f"{name}: seconds on GPUs measured {measured}, simulated {simulated[name]}")
        mainly = max(measured, key=measured.__getitem__)
        alike += mainly == max(simulated[name], key=simulated[name].__getitem__)
        gpus = settings["gpus"]
        if isinstance(gpus, list):
            assert set(measured) == set(simulated[name]) == {tuple(gpus)}
        else:  # one worker of several may have its memory a little before the others
            assert max(map(len, measured)) == len(mainly) == gpus
    print(f"{alike} of {len(configured)} models mostly where the simulator had them")
    assert alike > len(configured) / 2


def test_the_simulator_agrees_with_the_real_thing(
    llmux: LlmuxGuest, tmp_path: pathlib.Path
) -> None:
    count = int(os.environ.get("LLMUX_SIM_REQUESTS", "150"))
    configured = models()
    policy = {"policy_type": "fair", "request_timeout_secs": 600}
    llmux.begin(configured, gpu_count=GPUS, policy=policy)
    cursor = llmux.cursor()
    rows = trace_of(list(configured), count)
    llmux.guest.write(TRACE, json.dumps(rows))
    done = llmux.run(["python3", PROGRAM, TRACE], check=False, timeout=1400)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == []
    measured = sorted(report["waits"])
    ledger = report["ledger"]
    print(f"{ledger['looks']} looks at the ledger; over: {ledger['over']}; {ledger['complaints']}")
    assert ledger["over"] == ledger["complaints"] == []

    file = tmp_path / "config.yaml"
    document = {
        "vllm_command": "/bin/true",
        "models": configured,
        "policy": policy,
        "gpu_count": GPUS,
    }
    file.write_text(json.dumps(document))
    config = load_config(file, check_files=False)
    said = llmux.run(
        ["journalctl", "-u", "llmux", "-o", "json", "--after-cursor", cursor]
    ).stdout.splitlines()
    about = {"LLMUX_MODEL": "one0", "LLMUX_ARRIVALS": "0", "LLMUX_DURATION_MS": "0"}
    said.append(json.dumps(about | {"__REALTIME_TIMESTAMP": "0"}))  # a short run has none
    _, costs = read_journal(said, config.models)
    trace = [Arrival(at, name, tokens / SPEED) for at, name, tokens in rows]
    result = Simulation(config, trace, costs, gpu_count=GPUS, record=True).run()
    simulated = sorted(request.wait or 0.0 for request in result.requests)
    assert not [request for request in result.requests if request.refused]

    check_places(configured, ledger["gpus"], placements(result))
    for what, real, model_of_it in (
        ("mean", sum(measured) / count, sum(simulated) / count),
        ("p95", quantile(measured, 0.95), quantile(simulated, 0.95)),
    ):
        print(f"{what}: measured {real:.3f} s, simulated {model_of_it:.3f} s")
        # a short trace has too few switches for more, on processors that have other work as well
        limit = 0.4 * real + 0.5 if count < 1000 else max(0.15 * real, 0.1)
        assert abs(real - model_of_it) <= limit, (what, real, model_of_it)
