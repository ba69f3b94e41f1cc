"""The package is installed again and again while clients stream and ask; prints a JSON report.

    upgrades.py --streams N --debs A.deb,B.deb --times K

N clients stream from alpha, one answer after the other; new requests go to beta at a steady pace.
Every answer is checked to its last byte. ``over``: how many streams began before an upgrade and
went on after it, the least of all upgrades.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from time import monotonic

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import client
import witness

EVERY_SECS = 0.1
TOKENS = 60  # of about one a second: longer than an upgrade takes
PATIENCE = 600.0


class Crowd:
    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.streams: list[client.Answer] = []
        self.requests: list[client.Answer] = []
        self.begun: dict[int, float] = {}  # streams that flow → since when
        self._numbers = itertools.count()

    async def streamer(self) -> None:
        while not self.over.is_set():
            number = next(self._numbers)
            self.begun[number] = monotonic()
            answer = await client.ask(
                "alpha", f"stream {number}", tokens=TOKENS, stream=True, timeout=PATIENCE
            )
            del self.begun[number]
            self.streams.append(answer)

    async def pour(self) -> None:
        asked: list[asyncio.Task[client.Answer]] = []
        while not self.over.is_set():
            asked.append(asyncio.create_task(client.ask("beta", f"new {len(asked)}", tokens=1)))
            await asyncio.sleep(EVERY_SECS)
        self.requests = await asyncio.gather(*asked)

    def longest_ms(self, began: float, ended: float) -> int:
        """Of the requests that were asked in that time."""
        waits = [one.seconds for one in self.requests if began <= one.started <= ended]
        return round(max(waits, default=0.0) * 1000)


def mains() -> list[int]:
    return [witness.main_pid(unit) for unit in (witness.SUPERVISOR, witness.GATEWAY)]


def install(deb: str) -> str:
    """As apt does it; what was said."""
    command = ["dpkg", "--force-confold", "--install", deb]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise witness.WitnessError(f"{deb}: {done.stdout}")
    return done.stdout


async def run(streams: int, debs: Sequence[str], times: int) -> dict[str, object]:
    for model in ("alpha", "beta"):
        first = await client.ask(model, "before", tokens=1)
        if not first.ok:
            raise witness.WitnessError(f"cannot begin: {first.error}")
    engines, seen = witness.scopes(), [mains()]
    crowd = Crowd()
    clients = [asyncio.create_task(crowd.streamer()) for _ in range(streams)]
    clients.append(asyncio.create_task(crowd.pour()))
    over, spans, said = [], [], ""
    for at in range(times):
        await asyncio.sleep(2.0)
        before, began = set(crowd.begun), monotonic()
        said = await asyncio.to_thread(install, debs[at % len(debs)])
        spans.append((began, monotonic()))
        over.append(len(before & crowd.begun.keys()))
        seen.append(mains())
    crowd.over.set()
    await asyncio.gather(*clients)
    wrong = [answer for answer in (*crowd.streams, *crowd.requests) if not answer.ok]
    return {
        "streams": len(crowd.streams),
        "requests": len(crowd.requests),
        "failed": [f"{one.model} {one.prompt}: {one.error}" for one in wrong[:20]],
        "over": min(over),
        "longest_ms": round(max(answer.seconds for answer in crowd.requests) * 1000),
        "longest_ms_each": [crowd.longest_ms(*span) for span in spans],
        "engines_the_same": witness.scopes() == engines,
        "mains": seen,
        "install_secs": [round(ended - began, 1) for began, ended in spans],
        "said": said,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--debs", required=True)
    parser.add_argument("--times", type=int, required=True)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(run(given.streams, given.debs.split(","), given.times))))
