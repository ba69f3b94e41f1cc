"""Models take turns COUNT times; after every answer, what its engine's processes may do.

Prints one JSON object: model → one entry for each turn, user, capabilities and limits by pid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
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


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    seen: dict[str, list[dict[str, Any]]] = {model: [] for model in arguments.models}
    for _ in range(arguments.count):
        for model in arguments.models:
            answer = await client.ask(model, "hello", timeout=120)
            if not answer.ok:
                raise SystemExit(f"{model}: {answer.error}")
            seen[model].append(rights(model))
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
