"""``llmux sim``: what a policy would do with a trace, simulated around the real core."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmux.config.load import load_config
from llmux.config.schema import Config, PolicyType
from llmux.errors import LlmuxError
from llmux.sim.bound import describe, lower_bound
from llmux.sim.costs import Costs, costs_from
from llmux.sim.journal import read_journal
from llmux.sim.plot import svg
from llmux.sim.report import report
from llmux.sim.trace import Arrival, read_trace
from llmux.sim.world import Simulation


def sim(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    if args.from_journal:
        trace, costs = read_journal(_read(args.from_journal).splitlines(), config.models)
    else:
        trace, costs = read_trace(_read(args.trace).splitlines(), str(args.trace)), Costs()
    costs = costs_from(_json(args.costs)) if args.costs else costs
    gpus = args.gpus or config.gpu_count or 1
    if args.from_journal and not args.policy:
        return _compare(args, config, trace, costs, gpus)
    if args.policy:
        config = _with_policy(config, PolicyType(args.policy))
    result = Simulation(config, trace, costs, gpu_count=gpus, seed=args.seed, record=True).run()
    found = report(result)
    if gpus == 1 and _one_at_a_time(config, trace):
        bound = lower_bound(trace, costs, config.gateway.max_in_flight)
        found["bound"] = describe(found["wait_s"]["mean"], bound)
    if args.plot:
        args.plot.write_text(svg(result), encoding="utf-8")
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


def _one_at_a_time(config: Config, trace: Sequence[Arrival]) -> bool:
    """No two of the models fit on the GPU together: the bound takes that for granted."""
    shares = sorted(config.models[name].gpu_memory for name in {one.model for one in trace})
    return len(shares) < 2 or sum(shares[:2]) > 1


def _with_policy(config: Config, kind: PolicyType) -> Config:
    return replace(config, policy=replace(config.policy, policy_type=kind))


def _compare(
    args: argparse.Namespace, config: Config, trace: Sequence[Arrival], costs: Costs, gpus: int
) -> int:
    """What each policy would have done with what the host was asked for."""
    found = {}
    for kind in PolicyType:
        simulation = Simulation(
            _with_policy(config, kind), trace, costs, gpu_count=gpus, seed=args.seed
        )
        found[kind.value] = report(simulation.run())
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    secs = trace[-1].at
    print(f"{len(trace)} requests for {len({one.model for one in trace})} models in {secs:.0f} s")
    print(f"{'wait, s':24}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}{'switches':>10}")
    for name, one in found.items():
        mark = " (configured)" if name == config.policy.policy_type else ""
        print(f"{_row(name + mark, one['wait_s'])}{one['switches']:>10}")
    return 0


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmuxError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise LlmuxError(f"cannot read {path}: {error}") from error


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        (
            f"{found['requests']} requests in {found['makespan_s']:g} s,"
            f" {found['unserved']} unserved, {found['cuts']} cut;"
            f" {found['switches']} switches take {found['switch_s']:g} s;"
            f" busy {found['busy_share']:.0%}, fairness {found['jain']:.3f}"
        ),
        f"{'wait, s':24}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}",
        _row("all", found["wait_s"]),
        *(_row(model, one["wait_s"]) for model, one in found["models"].items()),
    ]
    if (bound := found.get("bound")) is not None:
        kind = "the least possible" if bound["exact"] else "a lower bound without switches"
        lines.append(f"mean wait of {bound['mean_wait_s']:g} s is {kind}")
    return lines


def _row(name: str, wait: dict[str, float]) -> str:
    return f"{name:24}" + "".join(
        f"{wait[key]:>9.2f}" for key in ("mean", "p50", "p95", "p99", "max")
    )
