"""``llmux sim``: what a policy would do with a trace, simulated around the real core."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmux.config.choices import PolicyType
from llmux.config.files.documents import cause_of
from llmux.config.load import load_config
from llmux.config.schema import Config
from llmux.errors import LlmuxError
from llmux.sim.bound import describe, lower_bound
from llmux.sim.costs import Costs, ModelCosts, costs_from
from llmux.sim.journal import read_journal
from llmux.sim.plot import svg
from llmux.sim.report import report
from llmux.sim.trace import Arrival, read_trace
from llmux.sim.world import Simulation

WAITS = ("mean", "p50", "p95", "p99", "max")


def sim(args: argparse.Namespace) -> int:
    if args.plot and args.from_journal and not args.policy:
        raise LlmuxError("cannot draw all policies at once", hint="name one with --policy")
    config = load_config(args.config, check_files=False)  # its host may be another one
    if args.from_journal:
        trace, costs = read_journal(_read(args.from_journal).splitlines(), config.models)
    else:
        trace, costs = read_trace(_read(args.trace).splitlines(), str(args.trace)), Costs()
    if args.costs:
        costs = _costs(args.costs, config)
    gpus = args.gpus or config.gpu_count or 1
    if args.from_journal and not args.policy:
        return _compare(args, config, trace, costs, gpus)
    if args.policy:
        config = _with_policy(config, PolicyType(args.policy))
    result = Simulation(config, trace, costs, gpu_count=gpus, seed=args.seed, record=True).run()
    found = report(result)
    if gpus == 1 and not found["unserved"] and _one_at_a_time(config, trace):
        bound = lower_bound(trace, costs, config.gateway.max_in_flight)
        found["bound"] = describe(found["wait_s"]["mean"], bound)
    if args.plot:
        _plot(args.plot, svg(result))
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    if not args.json and not args.costs and not args.from_journal:
        print(_assumed(costs.default))
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
    models = _counted(len({one.model for one in trace}), "model")
    print(f"{_counted(len(trace), 'request')} for {models} in {trace[-1].at:.0f} s")
    print(f"{'wait, s':24}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}{'switches':>10}")
    for name, one in found.items():
        mark = " (configured)" if name == config.policy.policy_type else ""
        print(f"{_row(name + mark, one)}{one['switches']:>10}")
    return 0


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise LlmuxError(f"cannot read {path}: {cause_of(error)}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LlmuxError(f"cannot write {path}: {cause_of(error)}") from error


def _plot(path: Path, drawing: str) -> None:
    """As SVG, or as PNG by librsvg's program: Python has no drawing of its own."""
    if path.suffix.lower() != ".png":
        _write(path, drawing)
        return
    from llmux.daemon.pictures import draw_png

    draw_png(drawing, path)


def _costs(path: Path, config: Config) -> Costs:
    text = _read(path)
    try:
        costs = costs_from(json.loads(text))
    except ValueError as error:
        raise LlmuxError(f"cannot read {path}: {error}") from error
    for name in costs.models:
        if name not in config.models:
            raise LlmuxError(f'cannot use the costs in {path}: model "{name}" is not configured')
    return costs


def _assumed(costs: ModelCosts) -> str:
    return (
        f"assumed of each model: start {costs.start:g} s, wake {costs.wake:g} s,"
        f" park {costs.park:g} s, stop {costs.stop:g} s (--costs FILE.json gives yours)"
    )


def _lines(found: dict[str, Any]) -> list[str]:
    switches = _counted(found["switches"], "switch", "switches")
    lines = [
        (
            f"{_counted(found['requests'], 'request')} in {found['makespan_s']:g} s,"
            f" {found['unserved']} unserved, {found['cuts']} cut;"
            f" {switches} of {found['switch_s']:g} s in all;"
            f" busy {found['busy_share']:.0%}, fairness {found['jain']:.3f}"
        ),
        f"{'wait, s':24}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}",
        _row("all", found),
        *(_row(model, one) for model, one in found["models"].items()),
    ]
    if (bound := found.get("bound")) is not None:
        kind = "the least possible" if bound["exact"] else "a bound that no policy is below"
        lines.append(f"a mean wait of {bound['mean_wait_s']:g} s is {kind}")
    return lines


def _counted(count: int, noun: str, several: str = "") -> str:
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def _row(name: str, found: dict[str, Any]) -> str:
    """Of nothing that was served there are no waits."""
    wait, served = found["wait_s"], found["requests"] > found["unserved"]
    waits = (f"{wait[key]:>9.2f}" if served else f"{'-':>9}" for key in WAITS)
    return f"{name:24}" + "".join(waits)
