"""The time that llmux itself adds to a switch: everything but the engine's own work.

In a guest with the package installed and a stand-in engine without delays. For each switch: the
time of a request to the model that is not resident, minus the time of the same request to it once
it is, minus what the engine alone needs. The latter is measured in the same guest, straight at the
engine: for keep_running and freeze the median of its /sleep and of its /wake_up, for stop the
median of SIGTERM → all its processes gone and of exec → healthy. So everything else counts as
llmux's: the gateway, decisions, D-Bus, cgroups, verification of the GPU, and the canary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/system"))

HELP = "the time that llmux itself adds to a switch (root: runs in a guest)"
EVICTIONS = {
    "keep_running": "offload+keep_running",
    "freeze": "offload+freeze",
    "stop": "retain+stop",
}
TARGET_MS = {"p50": 50.0, "p99": 150.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument(
        "--mode",
        choices=EVICTIONS,
        action="append",
        help="how a model is parked; may be repeated, the first one gives the headline"
        " (default: keep_running)",
    )


def run(arguments: argparse.Namespace) -> int:
    from llmux_guest import Guest, LlmuxGuest, build_package  # from tests/system

    if os.geteuid() != 0:
        print("bench: needs root, to start a guest; next step: sudo scripts/bench switch")
        return 2
    modes: list[str] = arguments.mode or ["keep_running"]
    results: dict[str, dict[str, Any]] = {}
    package = build_package()
    with Guest.up(debs=[package]) as guest:
        llmux = LlmuxGuest(guest)
        for mode in modes:
            results[mode] = measure(llmux, mode, arguments.switches)
            print_table(mode, results[mode])
    document = {
        **results[modes[0]],
        "mode": modes[0],
        "modes": results,
        "switches": arguments.switches,
        "method": " ".join((__doc__ or "").split()),
        "target_ms": TARGET_MS,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0


def measure(llmux: Any, mode: str, switches: int) -> dict[str, Any]:
    from llmux_guest import model

    llmux.begin({name: model(EVICTIONS[mode]) for name in ("alpha", "beta")})
    program = "/srv/llmux/scripts/_bench/switch_in_guest.py"
    done = llmux.run(["python3", program, mode, str(switches)], check=False, timeout=600)
    if done.returncode != 0:
        raise SystemExit(f"bench: the measurement failed\n{done.stderr}\n{llmux.journal()}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(mode: str, result: dict[str, Any]) -> None:
    print(f"\n{EVICTIONS[mode]}: {result['count']} switches, milliseconds")
    print(f"  {'':28}{'p50':>8}{'p90':>8}{'p99':>8}")
    rows = {
        "request, with the switch": result["switch_ms"],
        "request, model resident": result["resident_ms"],
        **{f"engine alone: {name}": values for name, values in result["engine_ms"].items()},
        "llmux's own share": result["overhead_ms"],
        **{f"  phase {name}": values for name, values in result["by_phase"].items()},
    }
    for name, values in rows.items():
        print(f"  {name:28}" + "".join(f"{values[p]:8.1f}" for p in ("p50", "p90", "p99")))
    met = all(result["overhead_ms"][p] <= limit for p, limit in TARGET_MS.items())
    limits = ", ".join(f"{p} <= {limit:g}" for p, limit in TARGET_MS.items())
    print(f"  target {limits}: {'met' if met else 'MISSED'}; load average {result['load']:.1f}")


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "cpu": next(
            (
                line.partition(":")[2].strip()
                for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.machine(),
        ),
        "kernel": platform.release(),
    }
