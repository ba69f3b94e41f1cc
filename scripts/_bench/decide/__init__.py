"""What one decision of the core costs with many models waiting for one GPU.

Every model waits; one serves. Each event changes the demand for one model and is followed by a
whole decision, as if events came one by one (the loop applies those that come together at once).
Times are CPU time of the thread, which other programs on the machine do not change.

After that `llmux serve` with ``--waiting`` clients that wait for 200 models: memory of the one
process that is supervisor and gateway, its idle CPU, and the decisions of a core in that state.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from time import thread_time
from types import MappingProxyType
from typing import Any

from _bench.decide import waiting
from llmux.config.schema import (
    Config,
    Eviction,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.core.effects import RunPlan
from llmux.core.events import DemandChanged, OperationFinished, WorkerJoined
from llmux.core.records import State
from llmux.core.reducer import initial, reduce

HELP = "time the core's decisions by number of waiting models; memory and CPU of 5,000 that wait"

COUNTS = (20, 50, 100, 200, 400)
WAITING_FOR = 200  # models
GOALS = {"p99_ms": 5.0, "rss_mb": 100.0, "idle_cpu_percent": 0.5}
EVENTS = 2000
OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=int, nargs="+", default=list(COUNTS), metavar="N")
    parser.add_argument("--events", type=int, default=EVENTS, metavar="N")
    parser.add_argument("--waiting", type=int, default=5000, metavar="N", help="clients; 0 = none")
    parser.add_argument("--seconds", type=float, default=30.0, help="of their idleness")
    parser.add_argument("--policy", choices=[p.value for p in PolicyType], default=None)
    parser.add_argument("--json", type=Path, metavar="FILE")


def crowded(count: int, policy: PolicyConfig, requests: int = 1) -> State:
    """``count`` models wait for one GPU, on which one more serves a request."""
    names = ["served", *(f"m{i:03}" for i in range(count))]
    models = {name: ModelConfig(name, name, eviction=OFFLOAD) for name in names}
    config = Config(models=MappingProxyType(models), policy=policy)
    state = initial(config, gpu_count=1, epoch_prefix="b")
    for worker in ("w0", "w1"):
        state, _ = reduce(state, WorkerJoined(worker, {}), 0.0)
    state, effects = reduce(state, DemandChanged("w0", "served", 1, 0.0, 0, 0), 0.0)
    (start,) = [effect for effect in effects if isinstance(effect, RunPlan)]
    state, _ = reduce(state, OperationFinished("served", start.op, start.plan.success), 1.0)
    state, _ = reduce(state, DemandChanged("w0", "served", 0, None, 100, 0), 1.0)
    for index, name in enumerate(names[1:]):
        event = DemandChanged(f"w{index % 2}", name, requests, 1.0 + index / 1000, 0, 0)
        state, _ = reduce(state, event, 2.0)
    return state


def measure(count: int, events: int, policy: PolicyConfig, requests: int = 1) -> dict[str, float]:
    """``requests`` wait for each model."""
    state = crowded(count, policy, requests)
    times: list[float] = []
    for index in range(events):
        name = f"m{index % count:03}"
        event = DemandChanged(f"w{index % 2}", name, requests + index // count, 1.0, 0, 0)
        began = thread_time()
        state, _ = reduce(state, event, 2.0 + index / 1000)
        times.append(thread_time() - began)
    times.sort()
    return {
        "models": count,
        "p50_ms": round(1000 * times[len(times) // 2], 3),
        "p99_ms": round(1000 * times[len(times) * 99 // 100], 3),
        "max_ms": round(1000 * times[-1], 3),
    }


def run(arguments: argparse.Namespace) -> int:
    # a model that serves may stay: the costly case, in which every event finds all waiting still
    policy = PolicyConfig(min_active_secs=1000.0, max_wait_secs=1000.0)
    if arguments.policy:
        policy = replace(policy, policy_type=PolicyType(arguments.policy))
    rows = [measure(count, arguments.events, policy) for count in arguments.models]
    print("waiting models   p50 ms   p99 ms   max ms")
    for row in rows:
        print(f"{row['models']:>14} {row['p50_ms']:>8} {row['p99_ms']:>8} {row['max_ms']:>8}")
    document: dict[str, Any] = {"decisions": rows}
    if arguments.waiting:
        found = waiting.measure(WAITING_FOR, arguments.waiting, arguments.seconds)
        each = max(1, arguments.waiting // WAITING_FOR)
        found |= measure(WAITING_FOR, arguments.events, policy, each)
        found["rss_mb"] = round(found["rss_mib"] * 1.048576, 1)
        document["waiting"] = found
        print(f"\n{arguments.waiting} requests wait for {WAITING_FOR} models")
        for key, value in found.items():
            limit = GOALS.get(key)
            met = "" if limit is None else f"  (goal < {limit:g}: {_met(value < limit)})"
            print(f"  {key:20} {value}{met}")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    missed = arguments.waiting and any(found[key] >= limit for key, limit in GOALS.items())
    return 1 if missed else 0


def _met(met: bool) -> str:
    return "met" if met else "MISSED"
