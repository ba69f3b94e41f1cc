"""Load on both models while processes of llmux are killed or restarted; prints a JSON report.

Clients ask in a closed loop: plain and streamed requests to both models, so that switches are
always under way. After each blow everything is looked at again: every engine process must be the
same, and nothing may be where it should not. A request belongs to one of three kinds: over before
the blow, running when it fell, sent when the victims had ended. Only a death of the gateway excuses
a failure, and only of requests that were running.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from time import monotonic

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import client
import witness

MODELS = ("alpha", "beta")
CLIENTS = 2  # of each kind on each model
LONGEST_SECS = 60.0  # no request may take longer, whatever happens
ORDERLY = ("restart gateway", "restart both")
UNITS = {"supervisor": witness.SUPERVISOR, "gateway": witness.GATEWAY}


def members(units: list[str]) -> tuple[list[int], list[int]]:
    """(main processes, all processes) of the units: of a struck one, none may answer."""
    mains = [witness.main_pid(name) for name in units]
    return mains, [pid for name in units for pid in witness.processes(witness.SLICE / name)]


@dataclass(slots=True)
class Blow:
    """``begun`` to ``over``: in between the victims may still have accepted a connection."""

    what: str
    begun: float
    over: float


class Storm:
    def __init__(self, seed: int, tokens: int) -> None:
        self.random = random.Random(seed)
        self.tokens = tokens
        self.answers: list[client.Answer] = []
        self.blows: list[Blow] = []
        self.wrong: list[str] = []
        self._news = asyncio.Condition()
        self._over = False
        self._numbers = itertools.count()

    # --- load ---------------------------------------------------------------------------------

    async def _client(self, model: str, stream: bool) -> None:
        while not self._over:
            prompt = f"request {next(self._numbers)}"
            answer = await client.ask(
                model, prompt, stream=stream, tokens=self.tokens, timeout=LONGEST_SECS
            )
            self.answers.append(answer)
            async with self._news:
                self._news.notify_all()

    async def _answers(self, enough: int) -> None:
        """Until that many more requests have ended."""
        target = len(self.answers) + enough
        async with self._news:
            await self._news.wait_for(lambda: len(self.answers) >= target)

    async def _served_anew(self, since: float) -> None:
        """Until each model has answered, plain and streamed, a request sent after ``since``."""

        def all_of_them() -> bool:
            found = {(a.model, a.stream) for a in self.answers if a.ok and a.started > since}
            return len(found) == 2 * len(MODELS)

        async with self._news:
            await self._news.wait_for(all_of_them)

    # --- blows --------------------------------------------------------------------------------

    async def strike(self, what: str, before: dict[str, set[int]]) -> None:
        await self._answers(self.random.randrange(1, 8))
        await asyncio.sleep(self.random.random() * 0.1)  # anywhere between two events
        verb, _, target = what.partition(" ")
        names = [UNITS[name] for name in (UNITS if target == "both" else [target])]
        # in a thread: while this program stands still, running requests end and no new ones begin
        mains, victims = await asyncio.to_thread(members, names)
        begun = monotonic()
        if verb == "kill":
            for main in mains:
                os.kill(main, signal.SIGKILL)
            await asyncio.to_thread(witness.gone, victims, 20.0)
        else:
            await asyncio.to_thread(subprocess.run, ["systemctl", "restart", *names], check=True)
        blow = Blow(what, begun, monotonic())
        self.blows.append(blow)
        async with asyncio.timeout(LONGEST_SECS):
            await self._served_anew(blow.over)
        await asyncio.to_thread(self._look, what, before)

    def _look(self, what: str, before: dict[str, set[int]]) -> None:
        which = f"blow {len(self.blows)} ({what})"
        if (now := witness.scopes()) != before:
            self.wrong.append(f"after {which}: engine processes {now}, before {before}")
        self.wrong += [f"after {which}: {stray}" for stray in witness.strays(MODELS)]

    # --- all of it ----------------------------------------------------------------------------

    async def run(self, blows: list[str]) -> dict[str, object]:
        for model in MODELS:  # both engines exist before anything is counted
            first = await client.ask(model, "warm up", timeout=LONGEST_SECS)
            if not first.ok:
                raise witness.WitnessError(f"cannot begin: {first.error}")
        before = witness.scopes()
        clients = [
            asyncio.create_task(self._client(model, stream))
            for model in MODELS
            for stream in (False, True)
            for _ in range(CLIENTS)
        ]
        try:
            for what in blows:
                await self.strike(what, before)
        except TimeoutError:
            self.wrong.append(f"no service within {LONGEST_SECS:g} s of the last blow")
        self._over = True
        _, stuck = await asyncio.wait(clients, timeout=LONGEST_SECS + 5)
        for task in stuck:
            task.cancel()
        return self.report(len(stuck))

    def report(self, stuck: int) -> dict[str, object]:
        excused = {"cut": 0, "running": 0, "turned_away": 0}
        failed = []
        for answer in self.answers:
            hits = [b for b in self.blows if answer.started <= b.over and answer.ended >= b.begun]
            excused["running"] += bool(hits)
            if answer.ok:
                continue
            # only clients that were connected, and only to a gateway that was killed
            if not answer.refused and any(b.what in ("kill gateway", "kill both") for b in hits):
                excused["cut"] += 1
                continue
            # who waited for a model when the gateway was asked to stop: told so, and when to retry
            orderly = any(b.what in ORDERLY for b in hits)
            if orderly and answer.status == 503 and '"code": "shutting_down"' in answer.error:
                excused["turned_away"] += 1
                continue
            during = ", ".join(f"{b.what} {b.begun - answer.started:+.3f} s" for b in hits)
            failed.append(
                f"{answer.model} {'stream' if answer.stream else 'plain'} "
                f"after {answer.seconds:.3f} s ({during or 'long after'}): {answer.error}"
            )
        return {
            "blows": len(self.blows),
            "answers": len(self.answers),
            "streams": sum(answer.stream for answer in self.answers),
            "running_at_a_blow": excused["running"],
            "cut_by_death_of_the_gateway": excused["cut"],
            "turned_away_by_a_stopping_gateway": excused["turned_away"],
            "refused_connections": sum(answer.refused for answer in self.answers),
            "failed": failed,
            "stuck": stuck,
            "wrong": self.wrong,
            "longest_secs": round(max(answer.seconds for answer in self.answers), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("blows", nargs="+", help="'kill supervisor', 'restart gateway', …")
    arguments = parser.parse_args()
    blows = [
        what
        for blow in arguments.blows
        for what in [blow.rpartition("*")[0] or blow]
        for _ in range(int(blow.rpartition("*")[2]) if "*" in blow else 1)
    ]

    async def storm() -> dict[str, object]:
        return await Storm(arguments.seed, arguments.tokens).run(blows)

    print(json.dumps(asyncio.run(storm())))


if __name__ == "__main__":
    main()
