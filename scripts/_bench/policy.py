"""Every policy over the built-in workloads, simulated around the real core.

``fifo-before`` is the policy of the same name as it was before models stayed for what waits at
them; ``plain`` the simplest rule that does not collapse. Targets are printed as PASS or FAIL.
The last column is a mean wait that a clairvoyant cannot be below, and how many times that the last
policy's is. It is close for two models and places for all; far too low where engines are full (it
counts either the places or the switches) and for many models (it counts them as two groups).

With ``--seeds N`` each workload is made N times, and its figures are means. One trace has 8 to 60
switches, and which model comes first after one may hang on a single request: it can make a cell
20 % worse or better, for every policy.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from _bench.policy_workloads import PLACES, WORKLOADS, Workload, name_of
from llmux.config.schema import (
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    Process,
    Weights,
)
from llmux.core.policies.base import PolicyOf, Resident, Waiting, idle_first, oldest_first
from llmux.core.policies.cost_aware import CostAware
from llmux.core.policies.fair import Fair
from llmux.core.policies.fifo import Fifo
from llmux.core.policies.plain import Plain
from llmux.core.policies.time_slice import TimeSlice
from llmux.sim.bound import lower_bound
from llmux.sim.costs import Costs, ModelCosts
from llmux.sim.report import report
from llmux.sim.world import Simulation

HELP = "compare the policies over simulated workloads"

OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
THREE = ("fifo", "cost_aware", "time_slice")
COSTS = ("2", "10", "30", "38/4")
REPORT_SECS = 0.2  # coarser than a gateway's few ms: four times as fast, and alike for all


@dataclass(frozen=True, slots=True)
class FifoBefore:
    config: PolicyConfig

    def order(self, waiting: Sequence[Waiting], now: float) -> Sequence[str]:
        return oldest_first(waiting)

    def victims(self, residents: Sequence[Resident]) -> Sequence[str]:
        return idle_first(residents)

    def earliest(
        self, target: Waiting, victim: Resident, waiting: Sequence[Waiting], now: float
    ) -> float:
        return victim.serving_since + self.config.min_active_secs


POLICIES: dict[str, PolicyOf] = {
    "fifo-before": FifoBefore,
    "fifo": Fifo,
    "cost_aware": CostAware,
    "time_slice": TimeSlice,
    "plain": Plain,
    "fair": Fair,
}


def costs_of(cost: str, models: int) -> Costs:
    """``38/4``: the models in turn cost so much to switch to."""
    each = [float(part) for part in cost.split("/")]
    made = {
        name_of(index): ModelCosts(
            start=0.9 * each[index % len(each)],
            wake=0.9 * each[index % len(each)],
            park=0.1 * sum(each) / len(each),
        )
        for index in range(models)
    }
    return Costs(models=made)


def simulate(workload: Workload, cost: str, policy: str, seed: int = 0) -> dict[str, Any]:
    names = [name_of(index) for index in range(workload.models)]
    config = Config(
        models=MappingProxyType(
            {
                n: ModelConfig(n, n, eviction=OFFLOAD, gpu_memory=0.6, gpu_memory_parked=0.01)
                for n in names
            }
        ),
        gateway=GatewayConfig(max_in_flight=PLACES),
    )
    simulation = Simulation(
        config,
        workload.trace(seed),
        costs_of(cost, workload.models),
        policy=POLICIES[policy],
        timeouts=False,
        report_secs=REPORT_SECS,
    )
    found = report(simulation.run())
    found.pop("models")
    return {"workload": workload.name, "cost": cost, "policy": policy, **found}


def bound_of(workload: Workload, cost: str, seed: int = 0) -> float:
    return lower_bound(workload.trace(seed), costs_of(cost, workload.models), PLACES).mean_wait


def _simulate(job: tuple[int, str, str, int]) -> dict[str, Any]:
    return simulate(WORKLOADS[job[0]], *job[1:])


def _bound(job: tuple[int, str, int]) -> float:
    return bound_of(WORKLOADS[job[0]], *job[1:])


def averaged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several seeds' rows: the mean of each figure."""
    waits = {what: _mean([row["wait_s"][what] for row in rows]) for what in rows[0]["wait_s"]}
    makespan = _mean([row["makespan_s"] for row in rows])
    return rows[0] | {"wait_s": waits, "makespan_s": makespan, "seeds": len(rows)}


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--cost", nargs="+", default=list(COSTS), help="seconds of a switch")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="traces per workload")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)


def run(arguments: argparse.Namespace) -> int:
    chosen = [
        index
        for index, workload in enumerate(WORKLOADS)
        if not arguments.workload or workload.name in arguments.workload
    ]
    names = [WORKLOADS[index].name for index in chosen]
    cells = [(index, cost) for index in chosen for cost in arguments.cost]
    seeds = range(arguments.seeds)
    jobs = [
        (*cell, policy, seed) for cell in cells for policy in arguments.policy for seed in seeds
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        simulated = list(pool.map(_simulate, jobs, chunksize=1))
        least = list(pool.map(_bound, [(*cell, seed) for cell in cells for seed in seeds]))
    several = range(0, len(simulated), arguments.seeds)
    rows = [averaged(simulated[at : at + arguments.seeds]) for at in several]
    found = {(r["workload"], r["cost"], r["policy"]): r for r in rows}
    bounds = {
        (WORKLOADS[index].name, cost): _mean(least[at * len(seeds) : (at + 1) * len(seeds)])
        for at, (index, cost) in enumerate(cells)
    }
    for row in rows:
        bound = bounds[row["workload"], row["cost"]]
        row["bound_s"], row["times_the_bound"] = bound, times(row["wait_s"]["mean"], bound)
    for cost in arguments.cost:
        print(f"\nswitch cost {cost} s: mean wait, p99 wait, makespan in seconds")
        head = "".join(f"{policy:>24}" for policy in arguments.policy)
        print(f"{'':16}{head}{'bound':>10}{'times':>7}")
        for name in names:
            in_line = [found[name, cost, policy] for policy in arguments.policy]
            print(f"{name:16}" + "".join(_cell(row) for row in in_line) + _to(in_line[-1]))
    complete = set(arguments.policy) >= {*THREE, "plain", "fair"}
    targets = judge(found, names, arguments.cost) if complete else []
    for target in targets:
        print(("PASS  " if target["passed"] else "FAIL  ") + target["target"])
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "targets": targets}, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if all(target["passed"] for target in targets) else 1


def _cell(row: dict[str, Any]) -> str:
    wait = row["wait_s"]
    return f"{wait['mean']:>9.1f}{wait['p99']:>8.0f}{row['makespan_s']:>7.0f}"


def _to(row: dict[str, Any]) -> str:
    above = row["times_the_bound"]
    return f"{row['bound_s']:>10.1f}{'-' if above is None else f'{above:.2f}':>7}"


def times(mean: float, bound: float) -> float | None:
    return round(mean / bound, 3) if bound else None


def judge(
    found: dict[tuple[str, str, str], dict[str, Any]], names: list[str], costs: Sequence[str]
) -> list[dict[str, Any]]:
    """What ``fair`` has to show."""
    targets: list[dict[str, Any]] = []

    def value(name: str, cost: str, policy: str, what: str) -> float:
        row = found[name, cost, policy]
        return float(row["makespan_s"] if what == "makespan" else row["wait_s"][what])

    def check(passed: bool, text: str) -> None:
        targets.append({"passed": passed, "target": text})

    for cost in costs:
        for what in ("mean", "p99", "makespan"):
            sums = {
                p: sum(value(n, cost, p, what) for n in names) for p in (*THREE, "plain", "fair")
            }
            text = ", ".join(f"{policy} {total:.0f}" for policy, total in sums.items())
            best = min(sums[policy] for policy in THREE)
            check(sums["fair"] < best, f"cost {cost}: sum of {what} better than each: {text}")
            if what == "mean":
                check(sums["fair"] < sums["plain"], f"cost {cost}: sum of mean better than plain")
        for what, limit in (("mean", 1.05), ("p99", 1.10)):
            worse = {
                name: value(name, cost, "fair", what) / max(best, 0.5)
                for name in names
                if value(name, cost, "fair", what)
                > limit * max(best := min(value(name, cost, p, what) for p in THREE), 0.5)
            }
            text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in worse.items()) or "none"
            check(not worse, f"cost {cost}: {what} more than {limit:.2f} of the best: {text}")
        heavy = "heavy 75 %"
        if (heavy, cost, "fifo-before") in found:
            ratio = value(heavy, cost, "fifo-before", "mean") / value(heavy, cost, "fair", "mean")
            check(ratio >= 15, f"cost {cost}: {heavy}: {ratio:.1f} times better than fifo-before")
    return targets
