"""Figures of the rounds made into one table, with the goals beside them."""

from __future__ import annotations

from statistics import median
from typing import Any

from _bench.switch import machine

MIB = 1024 * 1024
# "No growth": one arena of Python's allocator, about a byte a request, less than any leak.
GROWTH_BYTES = MIB

Figures = dict[str, Any]


def document(rounds: list[Figures], memory: Figures, growth: Figures | None) -> Figures:
    names = [name for name in rounds[0] if name != "direct"]
    proxies = {name: _summary(name, rounds) for name in names}
    for name, one in memory.items():
        proxies[name]["bytes_per_stream"] = one["bytes_per_stream"]
    result = {"proxies": proxies, "memory": memory, "growth": growth, "rounds": rounds}
    return {**result, "goals": _goals(result), "machine": machine()}


def _summary(name: str, rounds: list[Figures]) -> Figures:
    short = [one[name]["short"] for one in rounds]
    summary = {
        "spread": _streaming(name, "spread", rounds),
        "together": _streaming(name, "together", rounds),
        "short": {
            "per_cpu_second": median(one["per_cpu_second"] for one in short),
            "per_second": median(one["per_second"] for one in short),
            "load_share": max(one["load_share"] for one in short),
        },
    }
    if "nginx" in rounds[0]:
        summary["short"]["to_nginx"] = median(
            one[name]["short"]["per_cpu_second"] / one["nginx"]["short"]["per_cpu_second"]
            for one in rounds
        )
    return summary


def _streaming(name: str, arrival: str, rounds: list[Figures]) -> Figures:
    (streams,) = rounds[0][name][arrival]
    own = [one[name][arrival][streams] for one in rounds]
    alone = [one["direct"][arrival][streams] for one in rounds]
    summary = {
        f"added_{key}": median(a[key] - b[key] for a, b in zip(own, alone, strict=True))
        for key in ("p50_us", "p99_us", "first_p50_us", "first_p99_us")
        if own[0][key] is not None
    }
    summary |= {
        "streams": int(streams),
        "cpu_us": median(one["cpu_us"] for one in own),
        "delivered": min(one["delivered"] for one in own),
        "load_share": max(one["load_share"] for one in own),
    }
    if "nginx" in rounds[0]:
        # Of pairs measured after one another: the machine's mood is in both.
        (other,) = rounds[0]["nginx"][arrival]
        summary["to_nginx"] = median(
            one[name][arrival][streams]["cpu_us"] / one["nginx"][arrival][other]["cpu_us"]
            for one in rounds
        )
    return summary


def _goals(result: Figures) -> dict[str, bool]:
    """By name, whether llmux meets it."""
    own = result["proxies"].get("llmux")
    if own is None:
        return {}
    spread, together, short = own["spread"], own["together"], own["short"]
    met = {
        "added p50": spread["added_p50_us"] <= 300,
        "added p99": spread["added_p99_us"] <= 2000,
        "short": short["per_cpu_second"] >= 15_000 or short.get("to_nginx", 0) >= 0.3,
        "memory": own["bytes_per_stream"] <= 20 * 1024,
    }
    if "to_nginx" in spread:
        met["cpu, spread"] = spread["to_nginx"] <= 1.3
        met["cpu, together"] = together["to_nginx"] <= 1.3
    if result["growth"] is not None:
        met["growth"] = result["growth"]["bytes"] <= GROWTH_BYTES
    return met


MS, KIB = 1e-3, 1 / 1024
# what, where in the summary, factor, decimals, the goal, its name in ``_goals``
ROWS: tuple[tuple[str, str, float, int, str, str], ...] = (
    ("streams, a chunk each 20 ms", "spread streams", 1, 0, "", ""),
    ("chunks spread over the 20 ms:", "", 1, 0, "", ""),
    ("  CPU per chunk, µs", "spread cpu_us", 1, 1, "", ""),
    ("  … to nginx's", "spread to_nginx", 1, 2, "<= 1.3", "cpu, spread"),
    ("  added to a chunk, p50, ms", "spread added_p50_us", MS, 3, "<= 0.3", "added p50"),
    ("  added to a chunk, p99, ms", "spread added_p99_us", MS, 3, "<= 2", "added p99"),
    ("  added to the first byte, p50, ms", "spread added_first_p50_us", MS, 3, "", ""),
    ("  added to the first byte, p99, ms", "spread added_first_p99_us", MS, 3, "", ""),
    ("  chunks that came, of those due", "spread delivered", 1, 3, "", ""),
    ("  CPU of engine and clients", "spread load_share", 1, 2, "", ""),
    ("chunks of all streams together:", "", 1, 0, "", ""),
    ("  CPU per chunk, µs", "together cpu_us", 1, 1, "", ""),
    ("  … to nginx's", "together to_nginx", 1, 2, "<= 1.3", "cpu, together"),
    ("  added to a chunk, p50, ms", "together added_p50_us", MS, 3, "", ""),
    ("  added to a chunk, p99, ms", "together added_p99_us", MS, 3, "", ""),
    ("  chunks that came, of those due", "together delivered", 1, 3, "", ""),
    ("  CPU of engine and clients", "together load_share", 1, 2, "", ""),
    ("short requests per CPU second", "short per_cpu_second", 1, 0, ">= 15000", "short"),
    ("  … to nginx's", "short to_nginx", 1, 2, "or >= 0.3", ""),
    ("  per second", "short per_second", 1, 0, "", ""),
    ("  CPU of engine and clients", "short load_share", 1, 2, "", ""),
    ("memory per open stream, KiB", "bytes_per_stream", KIB, 1, "<= 20", "memory"),
)


def print_table(result: Figures) -> None:
    proxies = result["proxies"]
    print(f"\n  {'':36}" + "".join(f"{name:>10}" for name in proxies) + f"{'goal':>12}")
    for what, where, factor, decimals, goal, name in ROWS:
        cells = "".join(_cell(one, where, factor, decimals) for one in proxies.values())
        print(f"  {what:36}{cells}{goal:>12}  {_verdict(result['goals'].get(name))}".rstrip())
    growth = result["growth"]
    if growth is not None:
        grown = f"{growth['bytes'] / 1024:+.0f} KiB"
        print(
            f"  llmux's memory from request {growth['requests'] // 10} to {growth['requests']}: "
            f"{grown}, goal: none (<= {GROWTH_BYTES // 1024} KiB)  "
            + _verdict(result["goals"].get("growth"))
        )
    facts = {**result["machine"], **result["versions"]}
    print("  " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))


def _cell(figures: Figures, where: str, factor: float, decimals: int) -> str:
    found: Any = figures
    for key in where.split():
        found = found.get(key)
    return f"{'' if not where or found is None else f'{found * factor:.{decimals}f}':>10}"


def _verdict(met: bool | None) -> str:
    return "" if met is None else "PASS" if met else "MISS"
