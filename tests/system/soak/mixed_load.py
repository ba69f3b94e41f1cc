"""Mixed load for minutes on end, and what the services use meanwhile. Prints JSON, rows on stderr.

    mixed_load.py --minutes=30 --rows=30 --seed=5 alpha beta …

Streams, short requests, embeddings and clients that leave, of a few clients in a closed loop;
beside them what operators do: `llmux ps`, a scrape, orders, a reload. Nothing is killed or damaged
here, so nothing may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import random
import sys
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "load"))
sys.path.insert(0, str(HERE.parent / "chaos"))
sys.path.insert(0, str(HERE))

import blows  # noqa: E402 (the path first)
import client  # noqa: E402
import figures  # noqa: E402
import invariants  # noqa: E402
import witness  # noqa: E402

CLIENTS = 8
WANDERS = 0.15  # how often a client goes to another model
LEAVES = 0.1
LEAVES_WITHIN_SECS = 0.5
THINKS_SECS = 0.4  # between two requests, at most
ANSWER_SECS = 90.0
PS_SECS, SCRAPE_SECS, ORDER_SECS, RELOAD_SECS = 5, 10, 15, 45
SWITCHES = "llmux_switches_total"
GAUGES = ("llmux_in_flight", "llmux_queue_depth")


class MixedLoad:
    def __init__(self, seed: int, models: tuple[str, ...]) -> None:
        self.models = models
        self.random = random.Random(seed)
        self.operator = blows.Blows(random.Random(seed + 1), models)
        self.kinds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.orders: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []
        self.pids = figures.services()
        self.longest = {"answer": 0.0, "ps": 0.0, "scrape": 0.0}
        self._over = asyncio.Event()

    # ---- clients ----------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        mine = random.Random(self.random.random() + number)
        model = mine.choice(self.models)
        while not self._over.is_set():
            if mine.random() < WANDERS:
                model = mine.choice(self.models)
            await self._one(mine, model)
            await self._pause(mine.random() * THINKS_SECS)

    async def _one(self, mine: random.Random, model: str) -> None:
        prompt = f"soak {mine.random()}"
        kind = mine.choices(("stream", "short", "embedding"), (5, 4, 1))[0]
        if kind == "embedding":
            asked = asyncio.create_task(client.embed(model, prompt, timeout=ANSWER_SECS))
        else:
            tokens = mine.randrange(20, 200) if kind == "stream" else mine.randrange(1, 8)
            asked = asyncio.create_task(
                client.ask(
                    model, prompt, stream=kind == "stream", tokens=tokens, timeout=ANSWER_SECS
                )
            )
        if mine.random() < LEAVES:
            await asyncio.wait([asked], timeout=mine.random() * LEAVES_WITHIN_SECS)
            if asked.cancel():
                await asyncio.wait([asked])
                self.kinds["left"] += 1
                return
        self._judge(kind, await asked)

    def _judge(self, kind: str, answer: client.Answer) -> None:
        self.longest["answer"] = max(self.longest["answer"], answer.seconds)
        if answer.ok:
            self.kinds[kind] += 1
            return
        said = f"{answer.model} {kind} after {answer.seconds:.3f} s: {answer.error[:400]}"
        is_failure = answer.status != 200 or "an error event" in answer.error
        (self.failed if is_failure else self.wrong).append(said)

    async def _pause(self, seconds: float) -> None:
        """Or until it is all over."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            pass

    # ---- operators --------------------------------------------------------------------------

    async def _each(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while not self._over.is_set():
            await self._pause(seconds)
            await act()

    async def _ps(self) -> None:
        began = monotonic()
        done = await asyncio.to_thread(blows.run, "llmux", "ps")
        self.longest["ps"] = max(self.longest["ps"], monotonic() - began)
        if done.returncode or not all(model in done.stdout for model in self.models):
            self.failed.append(f"llmux ps: {done.returncode} {done.stdout} {done.stderr}")
        self.orders["ps"] += 1

    async def _scrape(self) -> None:
        began = monotonic()
        await asyncio.to_thread(scrape)
        self.longest["scrape"] = max(self.longest["scrape"], monotonic() - began)
        self.orders["scrape"] += 1

    async def _order(self) -> None:
        """One that may be refused, as a checkpoint of a model that is busy; it is counted."""
        name = self.random.choice(("load", "checkpoint", "pin"))
        model = self.random.choice(self.models)
        done = await asyncio.to_thread(blows.run, "llmux", name, model, timeout=ANSWER_SECS)
        self.orders[f"{name}, ended with {done.returncode}"] += 1
        if name == "pin" and done.returncode == 0:
            await self._pause(2)
            done = await asyncio.to_thread(blows.run, "llmux", "unpin", timeout=ANSWER_SECS)
        if done.returncode not in (0, 1, 3):
            self.failed.append(f"llmux {name} {model}: {done.returncode} {done.stderr}")

    async def _reload(self) -> None:
        await self.operator.reload("")
        self.orders["reload"] += 1

    # ---- figures ----------------------------------------------------------------------------

    def _row(self, began: float, journal: figures.Journal) -> dict[str, Any]:
        if (now := figures.services()) != self.pids:
            self.failed.append(f"the processes were {self.pids} and are {now}")
            self.pids = now
        return {
            "minute": round((monotonic() - began) / 60, 2),
            "answered": sum(self.kinds.values()) - self.kinds["left"],
            "left": self.kinds["left"],
            "wrong": len(self.wrong),
            "failed": len(self.failed),
            "processes": {name: figures.process(pid) for name, pid in now.items()},
            "journal": journal.count(),
            "disk_kib": figures.disk(),
        }

    async def run(self, minutes: float, rows: int) -> dict[str, Any]:
        for model in self.models:
            first = await client.ask(model, "warm up", timeout=ANSWER_SECS)
            if not first.ok:
                raise witness.WitnessError(f"cannot begin: {first.error}")
        journal = figures.Journal()
        switches = await asyncio.to_thread(total, SWITCHES)
        began = monotonic()
        work = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        for seconds, act in (
            (PS_SECS, self._ps), (SCRAPE_SECS, self._scrape), (ORDER_SECS, self._order),
            (RELOAD_SECS, self._reload),
        ):  # fmt: skip
            work.append(asyncio.create_task(self._each(min(seconds, minutes * 60 / 12), act)))
        for number in range(1, rows + 1):
            await asyncio.sleep(max(0.0, began + number * minutes * 60 / rows - monotonic()))
            row = await asyncio.to_thread(self._row, began, journal)
            self.rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        took = monotonic() - began
        self._over.set()
        _, stuck = await asyncio.wait(work, timeout=2 * ANSWER_SECS)
        self.failed += [f"never ended: {task.get_coro()}" for task in stuck]
        for task in work:
            if task.done() and task.exception():
                raise witness.WitnessError("a part of the load ended") from task.exception()
        report = await asyncio.to_thread(self._report, took, journal)
        return {**report, "switches": await asyncio.to_thread(total, SWITCHES) - switches}

    def _report(self, seconds: float, journal: figures.Journal) -> dict[str, Any]:
        said, busy = invariants.at_rest(self.models)
        left = busy or invariants.lies(said)
        gauges = {name: value for name, value in scrape() if name.startswith(GAUGES) and value}
        hours = seconds / 3600
        journal.count()
        lines = {who: kinds.total() for who, kinds in journal.said.items()}
        return {
            "seconds": round(seconds),
            "answers": dict(self.kinds),
            "orders": dict(sorted(self.orders.items())),
            "wrong": self.wrong,
            "failed": self.failed,
            "longest_secs": {name: round(value, 2) for name, value in self.longest.items()},
            "left": left + [f"{name} is {value:g}" for name, value in gauges.items()],
            "strays": witness.strays(self.models),
            "journal_lines": lines,
            "journal_lines_per_hour": {who: round(n / hours) for who, n in lines.items()},
            "journal_kinds": {
                who: dict(kinds.most_common(15)) for who, kinds in journal.said.items()
            },
            "worth_a_look": journal.worth_a_look,
            "rows": self.rows,
        }  # fmt: skip


def scrape() -> list[tuple[str, float]]:
    """(series, value) of the gateway's own /metrics."""
    with urllib.request.urlopen("http://127.0.0.1:3000/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return [(name, float(value)) for name, _, value in pairs]


def total(name: str) -> int:
    return int(sum(value for series, value in scrape() if series.partition("{")[0] == name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()

    async def soak() -> dict[str, Any]:
        load = MixedLoad(arguments.seed, tuple(arguments.models))
        return await load.run(arguments.minutes, arguments.rows)

    print(json.dumps(asyncio.run(soak())))


if __name__ == "__main__":
    main()
