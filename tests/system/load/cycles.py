"""A model is asked COUNT times and parked in between; what its engine's processes may do each time.

Prints a JSON object, {"turns": [one for each time]}: user, capabilities and limits by pid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import subprocess
from typing import Any

import client

SLICE = pathlib.Path("/sys/fs/cgroup/llmux.slice")
STATUS = (
    "Name", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
    "Seccomp", "Seccomp_filters",
)  # fmt: skip
CONTROLS = ("memory.max", "memory.high", "pids.max", "cpu.weight")


def rights(model: str) -> dict[str, Any]:
    scope = SLICE / f"llmux-{model}.scope"
    found: dict[str, Any] = {name: (scope / name).read_text().strip() for name in CONTROLS}
    for pid in (scope / "engine/cgroup.procs").read_text().split():
        process = pathlib.Path("/proc", pid)
        lines = (process / "status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        found[pid] = {name: status[name] for name in STATUS}
        found[pid]["limits"] = (process / "limits").read_text()
        found[pid]["oom_score_adj"] = (process / "oom_score_adj").read_text().strip()
    return found


def park(model: str) -> None:
    """As its eviction says; answered when it is parked."""
    subprocess.run(["llmux", "sleep", model], check=True, timeout=120, capture_output=True)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("model")
    arguments = parser.parse_args()
    seen: list[dict[str, Any]] = []
    while True:
        answer = await client.ask(arguments.model, "hello", timeout=120)
        if not answer.ok:
            raise SystemExit(f"{arguments.model}: {answer.error}")
        seen.append(rights(arguments.model))
        if len(seen) == arguments.count:
            break
        park(arguments.model)
    print(json.dumps({"turns": seen}))


if __name__ == "__main__":
    asyncio.run(main())
