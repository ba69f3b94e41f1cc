"""A crowd on three models that take turns: plain, streamed and abandoned requests; a JSON report.

Clients ask in a closed loop. One stays with its model for a while, so that a turn serves many, and
then goes to another, so that turns are many. Some leave before or in the middle of their answer.
Some ask for a stream that is longer than a drain: it must end whole, or by an error event that says
that it was cut. Everything else must be exactly what the model says to that prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import urllib.request
from collections import Counter
from time import monotonic

import client
import witness

MODELS = ("alpha", "beta", "gamma")
CLIENTS = 30
LEAVES = 0.1  # share of requests whose client leaves …
LEAVES_WITHIN_SECS = 0.15  # … at some moment in this time
LONG = 0.02  # share of streams that outlast a drain
LONG_TOKENS = 300
DRAIN_SECS = 0.3  # an engine that gets no time of the CPU for so long is cut in a short answer, too
WANDERS = 0.12  # how often a client goes to another model
CUT = '"code": "cut_by_switch"'
GAUGES = ("llmux_in_flight", "llmux_queue_depth")


def metrics() -> list[tuple[str, float]]:
    """(series, value) of the gateway's own /metrics."""
    with urllib.request.urlopen("http://127.0.0.1:3000/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return [(name, float(value)) for name, _, value in pairs]


def total(name: str) -> int:
    return int(sum(value for series, value in metrics() if series.partition("{")[0] == name))


class Crowd:
    def __init__(self, count: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.left = count
        self.kinds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._numbers = itertools.count()

    async def client(self) -> None:
        model = self.random.choice(MODELS)
        while self.left > 0:
            self.left -= 1
            if self.random.random() < WANDERS:
                model = self.random.choice(MODELS)
            await self._one(model)

    async def _one(self, model: str) -> None:
        stream = self.random.random() < 0.5
        tokens = LONG_TOKENS if stream and self.random.random() < LONG else 16
        prompt = f"request {next(self._numbers)}"
        asked = asyncio.create_task(
            client.ask(model, prompt, stream=stream, tokens=tokens, timeout=60)
        )
        if self.random.random() < LEAVES:
            await asyncio.wait([asked], timeout=self.random.random() * LEAVES_WITHIN_SECS)
            if asked.cancel():
                await asyncio.wait([asked])
                self.kinds["abandoned"] += 1
                return
        answer = await asked
        kind = "stream" if stream else "plain"
        if answer.ok:
            self.kinds[kind] += 1
        elif tokens == LONG_TOKENS and CUT in answer.error:
            self.kinds["cut, and told so"] += 1
        elif CUT in answer.error and answer.seconds > DRAIN_SECS:
            self.kinds["cut after a stall"] += 1
        else:
            self.wrong.append(f"{model} {kind} after {answer.seconds:.3f} s: {answer.error}")

    async def run(self) -> dict[str, object]:
        for model in MODELS:
            first = await client.ask(model, "warm up")
            if not first.ok:
                raise witness.WitnessError(f"cannot begin: {first.error}")
        before = total("llmux_switches_total")
        began = monotonic()
        await asyncio.gather(*(self.client() for _ in range(CLIENTS)))
        seconds = monotonic() - began
        await asyncio.to_thread(
            witness.until, "all gauges are 0", lambda: not any(total(name) for name in GAUGES)
        )
        return {
            "requests": sum(self.kinds.values()) + len(self.wrong),
            "kinds": dict(self.kinds),
            "wrong": self.wrong[:20],
            "switches": total("llmux_switches_total") - before,
            "gauges": {name: total(name) for name in GAUGES},
            "seconds": round(seconds, 1),
            "strays": witness.strays(MODELS),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(Crowd(arguments.count, arguments.seed).run())))
