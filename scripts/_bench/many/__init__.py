"""Many models, many clients at once: what becomes of everybody, and what it costs the supervisor.

In a guest with the package installed: one GPU, stand-in engines without delays, policy and limits
by default. All requests come within a few seconds, spread over all models, so that nearly every
model waits for the one GPU. Measured: the answers (in time, or refused with a Retry-After), the
time from the first request to the first answer, which is one switch, the supervisor's share of a
processor, and how long `llmux ps` takes meanwhile. What one event costs the core by the number of
models is `bench decide`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from _bench.switch import machine

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/system"))

HELP = "5,000 requests to 200 models on one GPU (root: runs in a guest)"
GOALS = {"first_answer_secs": 1.0, "supervisor_share": 0.3, "ps_secs_max": 0.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=3.0, help="in which they come")
    parser.add_argument("--timeout", type=float, default=300.0, help="of a request at llmux")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")


def run(arguments: argparse.Namespace) -> int:
    from llmux_guest import Guest, LlmuxGuest, build_package, model  # from tests/system

    if os.geteuid() != 0:
        print("bench: needs root, to start a guest; next step: sudo scripts/bench many")
        return 2
    names = [f"m{number:03}" for number in range(arguments.models)]
    with Guest.up(debs=[build_package()]) as guest:
        llmux = LlmuxGuest(guest)
        policy = {"request_timeout_secs": arguments.timeout}
        llmux.begin({name: model("retain+stop") for name in names}, policy=policy)
        program = "/srv/llmux/scripts/_bench/many/in_guest.py"
        done = llmux.run(
            [
                "python3", program, f"--requests={arguments.requests}",
                f"--seconds={arguments.seconds}", f"--timeout={arguments.timeout}", *names,
            ],
            check=False,
            timeout=arguments.timeout + 120,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"bench: the measurement failed\n{done.stderr}\n{llmux.journal()}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result |= {"models": arguments.models, "machine": machine(), "load": os.getloadavg()[0]}
    print(json.dumps(result, indent=1))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    missed = [name for name, limit in GOALS.items() if result[name] > limit]
    if result["wrong"]:
        missed.append("wrong")
    print(f"missed: {', '.join(missed)}" if missed else "all goals are met")
    return 1 if missed else 0
