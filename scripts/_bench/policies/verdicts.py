"""What ``fair`` has to show over the workloads, each with its verdict and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from _bench.policies.workloads import PLACES, Workload

THREE = ("fifo", "cost_aware", "time_slice")
HEAVY = "heavy 75 %"
LIMITS = {"mean": 1.05, "p99": 1.10}
LEAST_SECS = 0.5  # shorter waits are taken to be so long: of nothing there is no share
NEAR = 1.25  # times the clairvoyant bound
FULL = 0.5  # share of the places that answers take together

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str, str], Row]  # by workload, cost and policy


def value(row: Row, what: str) -> float:
    return float(row["makespan_s"] if what == "makespan" else row["wait_s"][what])


def of_best(found: Rows, name: str, cost: str, what: str) -> float:
    """``fair``'s figure as a multiple of the best of the three others."""
    best = min(value(found[name, cost, policy], what) for policy in THREE)
    return value(found[name, cost, "fair"], what) / max(best, LEAST_SECS)


def by_seed(found: Rows, name: str, cost: str) -> list[float]:
    """The same of the mean wait, of each trace alone."""
    others = zip(*(found[name, cost, policy]["mean_by_seed"] for policy in THREE), strict=True)
    own = found[name, cost, "fair"]["mean_by_seed"]
    return [one / max(min(three), LEAST_SECS) for one, three in zip(own, others, strict=True)]


def judge(found: Rows, names: Sequence[str], costs: Sequence[str]) -> list[dict[str, Any]]:
    targets: list[dict[str, Any]] = []

    def check(passed: bool, text: str) -> None:
        targets.append({"passed": passed, "target": text})

    for cost in costs:
        for what in ("mean", "p99", "makespan"):
            sums = {
                policy: sum(value(found[name, cost, policy], what) for name in names)
                for policy in (*THREE, "plain", "fair")
            }
            text = ", ".join(f"{policy} {total:.0f}" for policy, total in sums.items())
            best = min(sums[policy] for policy in THREE)
            check(sums["fair"] < best, f"cost {cost}: sum of {what} better than each: {text}")
            if what == "mean":
                check(sums["fair"] < sums["plain"], f"cost {cost}: sum of mean better than plain")
        for what, limit in LIMITS.items():
            ratios = {name: of_best(found, name, cost, what) for name in names}
            worse = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio > limit]
            text = ", ".join(worse) or "none"
            check(not worse, f"cost {cost}: {what} more than {limit:.2f} of the best: {text}")
        before = found.get((HEAVY, cost, "fifo-before"))
        if before is not None:
            ratio = value(before, "mean") / value(found[HEAVY, cost, "fair"], "mean")
            check(ratio >= 15, f"cost {cost}: {HEAVY}: {ratio:.1f} times better than fifo-before")
    return targets


def is_loose(workload: Workload) -> str:
    """Why the clairvoyant bound is far too low for it; empty: it is not known to be."""
    if workload.models > 2:
        return "m"
    trace = workload.trace()
    secs = trace[-1].at - trace[0].at
    return "f" if sum(one.service for one in trace) > FULL * PLACES * secs else ""


def nearness(found: Rows, workloads: Sequence[Workload], costs: Sequence[str]) -> list[str]:
    """How near ``fair`` comes to what is possible, in words."""
    bounded = [(w, cost, found[w.name, cost, "fair"]["times_the_bound"])
               for w in workloads for cost in costs]  # fmt: skip
    lines = []
    for why, words in (
        ("", "two models, places for all"),
        ("f", "f, engines full: the bound counts their places or the switches, never both"),
        ("m", "m, more models: the bound counts them as two groups, in which switches are free"),
    ):
        ratios = [(t, w.name, cost) for w, cost, t in bounded if t and is_loose(w) == why]
        near = sum(ratio <= NEAR for ratio, _, _ in ratios)
        if ratios:
            (least, *_), (most, name, cost) = min(ratios), max(ratios)
            lines.append(
                f"{words}: {least:.2f} to {most:.2f} ({name}, cost {cost}) times the bound,"
                f" {near} of {len(ratios)} at most {NEAR}"
            )
    return lines
