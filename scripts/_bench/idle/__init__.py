"""What an installed llmux costs while nothing happens, and how it stands with lintian and systemd.

In a guest with the package installed, two models of the stand-in engine, one resident and one
parked. Memory: of all processes of the two services, as the kernel counts it (RSS counts a page in
every process that shares it, PSS shares it out). Time to READY: of `systemctl start llmux`, from
the start of the process until systemd heard that it is ready, the median of several starts. Idle
CPU: of both services' cgroups over some time in which nothing is asked. Exposure: `systemd-analyze
security`. lintian runs on this host, where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from statistics import median
from typing import Any

from _bench.switch import machine

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/system"))

HELP = "memory, time to READY and CPU of an idle llmux; lintian, exposure (root: runs in a guest)"
GOALS = {"rss_mib": 120.0, "ready_secs": 1.5, "idle_cpu_percent": 0.2}
UNITS = ("llmux.service", "llmux-gateway.service")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--starts", type=int, default=5, help="for the time to READY")
    parser.add_argument("--seconds", type=int, default=60, help="of idleness")


def run(arguments: argparse.Namespace) -> int:
    from llmux_guest import Guest, LlmuxGuest, build_package  # from tests/system

    if os.geteuid() != 0:
        print("bench: needs root, to start a guest; next step: sudo scripts/bench idle")
        return 2
    package = build_package()
    with Guest.up(debs=[package]) as guest:
        figures = measure(LlmuxGuest(guest), arguments.starts, arguments.seconds)
    document = {
        **figures,
        "lintian": lintian(package),
        "goals": {name: figures[name] <= most for name, most in GOALS.items()},
        "method": " ".join((__doc__ or "").split()),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print_table(document)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(document["goals"].values()) else 1


def measure(llmux: Any, starts: int, seconds: int) -> dict[str, Any]:
    from llmux_guest import model

    ready = []
    for _ in range(starts):
        llmux.begin({"alpha": model(), "beta": model("offload+freeze")})
        began, ended = (
            int(llmux.show(UNITS[0], f"{name}TimestampMonotonic"))
            for name in ("ExecMainStart", "ActiveEnter")
        )
        ready.append(round((ended - began) / 1e6, 3))
    for name in ("beta", "alpha"):
        if error := llmux.ask(name)["error"]:
            raise SystemExit(f"bench: {name} does not answer: {error}\n{llmux.journal()}")
    program = "/srv/llmux/scripts/_bench/idle/in_guest.py"
    done = llmux.run(["python3", program, str(seconds)], timeout=seconds + 60)
    costs: dict[str, Any] = json.loads(done.stdout)
    return {
        **costs,
        "rss_mib": round(sum(one["rss_mib"] for one in costs["memory"].values()), 1),
        "pss_mib": round(sum(one["pss_mib"] for one in costs["memory"].values()), 1),
        "ready_secs": median(ready),
        "starts": ready,
        "exposure": {unit: exposure(llmux, unit) for unit in UNITS},
    }


def exposure(llmux: Any, unit: str) -> str:
    """The last line of systemd-analyze: the score from 0, and the word for it."""
    said = llmux.run(["systemd-analyze", "security", "--no-pager", unit], check=False).stdout
    # "→ Overall exposure level for llmux.service: 9.3 UNSAFE :-{"
    found = re.search(r"exposure level for \S+: (\S+ \S+)", said)
    return found[1] if found else "unknown"


def lintian(package: str) -> list[str] | None:
    """What it has to say about the package; None where it is not installed."""
    if shutil.which("lintian") is None:
        return None
    command = ["lintian", "--allow-root", "--fail-on", "none", "--tag-display-limit", "0", package]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )  # its status says nothing
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]


def print_table(document: dict[str, Any]) -> None:
    print("\nan idle llmux")
    rows = [(unit, f"exposure {score}") for unit, score in document["exposure"].items()]
    for unit, one in document["memory"].items():
        size = f"RSS {one['rss_mib']:.1f} MiB, PSS {one['pss_mib']:.1f} MiB"
        rows.append((unit, f"{size}, {one['processes']} processes"))
    names = {"rss_mib": "RSS together, MiB", "ready_secs": "time to READY, s",
             "idle_cpu_percent": "idle CPU, % of a core"}  # fmt: skip
    for name, most in GOALS.items():
        met = "met" if document["goals"][name] else "MISSED"
        rows.append((names[name], f"{document[name]:g}  (goal <= {most:g}: {met})"))
    found = document["lintian"]
    rows.append(("lintian", "not installed here" if found is None else f"{len(found)} lines"))
    for name, text in rows:
        print(f"  {name:24}{text}")
    for line in found or ():
        print(f"    {line}")
    print(f"  load average {document['load_average']:.1f}")
