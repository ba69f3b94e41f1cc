"""The measuring half of `bench many`, inside the guest, on its Python alone. See the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import resource
import sys
from collections import Counter
from time import monotonic
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/system/load"))

import client  # noqa: E402 (the path first)
import witness  # noqa: E402

MARGIN_SECS = 10.0  # beyond llmux's own time limit, for the refusal itself
LOOK_SECS = 2.0  # between two looks with `llmux ps`


def processor_secs(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Looks:
    """`llmux ps` and the supervisor's processor time, again and again."""

    def __init__(self) -> None:
        self.pid = witness.main_pid(witness.SUPERVISOR)
        self.times: list[float] = []
        self.shares: list[float] = []

    async def go_on(self) -> None:
        while True:
            before, began = processor_secs(self.pid), monotonic()
            process = await asyncio.create_subprocess_exec(
                "llmux", "ps", stdout=asyncio.subprocess.DEVNULL
            )
            if await process.wait() != 0:
                raise witness.WitnessError("`llmux ps` failed")
            self.times.append(monotonic() - began)
            await asyncio.sleep(LOOK_SECS)
            self.shares.append((processor_secs(self.pid) - before) / (monotonic() - began))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    names, count = arguments.models, arguments.requests
    looks = Looks()
    before, began = processor_secs(looks.pid), monotonic()

    async def one(number: int) -> client.Answer:
        await asyncio.sleep(arguments.seconds * number / count)
        # Steps without a common divisor: models come in no order that a policy could like.
        model = names[number * 7919 % len(names)]
        limit = arguments.timeout + MARGIN_SECS
        return await client.ask(model, f"request {number}", tokens=4, timeout=limit)

    looking = asyncio.create_task(looks.go_on())
    answers = await asyncio.gather(*(one(number) for number in range(count)))
    seconds = monotonic() - began
    used = processor_secs(looks.pid) - before
    looking.cancel()
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    for answer in answers:
        if answer.ok:
            kinds["answered"] += 1
        elif answer.status in (429, 503, 504) and answer.retry_after is not None:
            kinds[f"{answer.status} with Retry-After"] += 1
        else:
            wrong.append(f"{answer.model}: {answer.error}")
    right = [answer for answer in answers if answer.ok]
    return {
        "requests": count,
        "kinds": dict(kinds),
        "wrong": wrong[:10],
        "seconds": round(seconds, 1),
        "first_answer_secs": round(min(one.ended for one in right) - began, 3),
        "longest_answer_secs": round(max(one.seconds for one in right), 1),
        "models_served": len({one.model for one in right}),
        "supervisor_share": round(used / seconds, 3),
        "supervisor_share_max": round(max(looks.shares, default=0.0), 3),
        "ps_secs_median": round(sorted(looks.times)[len(looks.times) // 2], 3),
        "ps_secs_max": round(max(looks.times), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("models", nargs="+")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))
