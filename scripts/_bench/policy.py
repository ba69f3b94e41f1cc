"""Every policy over the built-in workloads, simulated around the real core.

``fifo-before`` is the policy of the same name as it was before models stayed for what waits at
them; ``plain`` the simplest rule that does not collapse. Targets are printed as PASS or FAIL.

Each workload is made several times (``--seeds``), and its figures are means: one trace has 8 to 60
switches, and which model comes first after one may hang on a single request, which makes a cell
20 % worse or better, for every policy. ``of best`` says it: the last policy's mean wait, of that of
the best of the three others, over all traces and the least and greatest of a single one.

``bound``: a mean wait that a clairvoyant cannot be below, and how many times that the last policy's
is. It is close for two models and places for all. Letters say why it is too low
elsewhere; and where a switch is cheap, only who knows the future finds the gaps between arrivals.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

from _bench.policies.azure import AzureError, azure
from _bench.policies.verdicts import THREE, Rows, by_seed, is_loose, judge, nearness, of_best
from _bench.policies.workloads import FURTHER, PLACES, WORKLOADS, Workload, name_of
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
ALL = [*WORKLOADS, *FURTHER]  # and what was read from files, before the processes are forked
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
    return simulate(ALL[job[0]], *job[1:])


def _bound(job: tuple[int, str, int]) -> float:
    return bound_of(ALL[job[0]], *job[1:])


def averaged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several seeds' rows: the mean of each figure, and the mean wait by seed."""
    waits = {what: _mean([row["wait_s"][what] for row in rows]) for what in rows[0]["wait_s"]}
    makespan = _mean([row["makespan_s"] for row in rows])
    by_seed = [row["wait_s"]["mean"] for row in rows]
    return rows[0] | {"wait_s": waits, "makespan_s": makespan, "mean_by_seed": by_seed}


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--cost", nargs="+", default=list(COSTS), help="seconds of a switch")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--further", action="store_true", help="nine more workloads")
    parser.add_argument(
        "--azure", nargs="+", type=Path, metavar="FILE",
        help="instead: Azure's public LLM inference traces, a model for each file",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="traces per workload")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)


def _chosen(arguments: argparse.Namespace) -> list[int]:
    """Indices of the workloads. Raises AzureError."""
    if arguments.azure:
        workload = azure(arguments.azure)
        for seed in range(arguments.seeds):
            workload.trace(seed)
        ALL.append(workload)
        return [len(ALL) - 1]
    return [
        index
        for index, workload in enumerate(ALL)
        if (
            workload.name in arguments.workload
            if arguments.workload
            else arguments.further or index < len(WORKLOADS)
        )
    ]


def run(arguments: argparse.Namespace) -> int:
    try:
        chosen = _chosen(arguments)
    except AzureError as error:
        print(f"bench: {error}")
        return 2
    names = [ALL[index].name for index in chosen]
    cells = [(index, cost) for index in chosen for cost in arguments.cost]
    seeds = range(arguments.seeds)
    jobs = [
        (*cell, policy, seed) for cell in cells for policy in arguments.policy for seed in seeds
    ]
    with ProcessPoolExecutor(arguments.jobs, get_context("fork")) as pool:
        simulated = list(pool.map(_simulate, jobs, chunksize=1))
        least = list(pool.map(_bound, [(*cell, seed) for cell in cells for seed in seeds]))
    several = range(0, len(simulated), arguments.seeds)
    rows = [averaged(simulated[at : at + arguments.seeds]) for at in several]
    found = {(r["workload"], r["cost"], r["policy"]): r for r in rows}
    bounds = {
        (ALL[index].name, cost): _mean(least[at * len(seeds) : (at + 1) * len(seeds)])
        for at, (index, cost) in enumerate(cells)
    }
    for row in rows:
        bound = bounds[row["workload"], row["cost"]]
        row["bound_s"], row["times_the_bound"] = bound, times(row["wait_s"]["mean"], bound)
    complete = set(arguments.policy) >= {*THREE, "plain", "fair"}
    for cost in arguments.cost:
        print(f"\nswitch cost {cost} s: mean wait, p99 wait, makespan in seconds")
        head = "".join(f"{policy:>24}" for policy in arguments.policy)
        print(f"{'':16}{head}{'bound':>10}{'times':>9}{'of best, by trace':>22}")
        for workload in (ALL[index] for index in chosen):
            in_line = [found[workload.name, cost, policy] for policy in arguments.policy]
            line = "".join(map(_cell, in_line)) + _to(in_line[-1], is_loose(workload))
            spread = _spread(found, workload.name, cost) if complete else ""
            print(f"{workload.name:16}{line}{spread:>22}")
    targets = judge(found, names, arguments.cost) if complete else []
    if complete:
        print("\n" + "\n".join(nearness(found, [ALL[i] for i in chosen], arguments.cost)))
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


def _to(row: dict[str, Any], loose: str) -> str:
    above = row["times_the_bound"]
    return f"{row['bound_s']:>10.1f}{'-' if above is None else f'{above:.2f}':>7}{loose:>2}"


def _spread(found: Rows, name: str, cost: str) -> str:
    """``fair``'s mean wait against the best of the three: of all traces, and of single ones."""
    single = by_seed(found, name, cost)
    return f"{of_best(found, name, cost, 'mean'):.2f} ({min(single):.2f}-{max(single):.2f})"


def times(mean: float, bound: float) -> float | None:
    return round(mean / bound, 3) if bound else None
