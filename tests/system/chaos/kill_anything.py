"""Kill, stop, freeze, damage, fill, reload: blows drawn by a seed while clients ask. Prints JSON.

After every blow the answers so far, the processes and the GPU ledger are looked at; now and then
the clients pause until nothing is under way, and llmux's word is compared with the system. Ends at
the first violation unless told to go on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import random
import sys
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "load"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import blows
import client
import invariants
import witness

ANSWER_SECS = 60.0  # request_timeout_secs of the configuration, a switch, and a busy machine
RECOVERY_SECS = 60.0  # until a model answers again after a blow
REST_EVERY = 20
HONEST = {429, 502, 503, 504}


@dataclass(slots=True)
class Struck:
    number: int
    name: str
    model: str
    begun: float
    over: float = float("inf")

    def __str__(self) -> str:
        return f"{self.number} {self.name} {self.model} at {self.begun:.3f} to {self.over:.3f}"


class Chaos:
    def __init__(self, seed: int, models: tuple[str, ...]) -> None:
        self.random = random.Random(seed)
        self.models = models
        self.blows = blows.Blows(random.Random(seed + 1), models)
        self.struck: list[Struck] = []
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0
        self.recovery = 0.0
        self._asking = asyncio.Event()
        self._asking.set()
        self._over = False
        self._busy = 0
        self._pause = asyncio.Condition()

    # ---- load -------------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        mine = random.Random(number)
        while not self._over:
            await self._asking.wait()
            self._busy += 1
            model = mine.choice(self.models)
            answer = await client.ask(
                model, f"chaos {mine.random()}", stream=mine.random() < 0.5,
                tokens=mine.randrange(1, 40), timeout=ANSWER_SECS,
            )  # fmt: skip
            self._judge(answer)
            self._busy -= 1
            async with self._pause:
                self._pause.notify_all()
            if not answer.ok:
                await asyncio.sleep(0.05)  # as a client backs off

    def _judge(self, answer: client.Answer) -> None:
        self.longest = max(self.longest, answer.seconds)
        if answer.ok:
            self.answers["right"] += 1
            return
        during = [b for b in self.struck if b.begun <= answer.ended and b.over >= answer.started]
        status = answer.error.partition("WrongAnswerError: status ")[2]
        cut = answer.error.startswith(("IncompleteReadError", "Connection", "EOFError"))
        if status:
            code, _, body = status.partition(": ")
            try:
                said = json.loads(body)["error"]
                honest = bool(said["message"]) and bool(said["code"])
            except (ValueError, KeyError, TypeError):
                honest = body.endswith('"') or len(body) >= 500  # cut by the client's excerpt
            gone = any(b.name == "remove_and_add" and b.model == answer.model for b in during)
            if honest and (int(code) in HONEST or (int(code) == 404 and gone)):
                self.answers[f"refused with {code}"] += 1
                return
            if int(code) == 500 and blows.ORDERED in body and self._was_ordered(answer):
                self.answers["the engine's own error, passed on"] += 1
                return
        elif "an error event" in answer.error:
            self.answers["broken off with an error event"] += 1
            return
        elif cut and not answer.refused and any(b.name in blows.ENDS_GATEWAY for b in during):
            self.answers["cut by the end of a gateway"] += 1
            return
        self.wrong.append(
            f"{answer.model} {'stream' if answer.stream else 'plain'} after {answer.seconds:.3f} s,"
            f" during {[b.name for b in during]}: {answer.error[:400]}"
        )

    def _was_ordered(self, answer: client.Answer) -> bool:
        return any(
            b.name == "fault" and b.model == answer.model and b.begun <= answer.ended
            for b in self.struck[-blows.FAULT_BLOWS :]
        )

    # ---- blows ------------------------------------------------------------------------------

    async def strike(self) -> None:
        name = self.random.choice(sorted(blows.TABLE))
        model = self.random.choice(self.models)
        blow = Struck(len(self.struck) + 1, name, model, monotonic())
        self.struck.append(blow)
        await self.blows.strike(name, model)
        await asyncio.sleep(self.random.random() * 0.5)  # the next one anywhere in what follows
        blow.over = monotonic()
        for stray in await asyncio.to_thread(self._strays):
            self.wrong.append(f"after {blow}: {stray}")
        for fault in await asyncio.to_thread(invariants.ledger_faults):
            self.wrong.append(f"after {blow}: {fault}")

    def _strays(self) -> list[str]:
        """Seen twice: a process on its way into its scope is no stray."""
        first = set(witness.strays(self.models))
        return [stray for stray in witness.strays(self.models) if stray in first] if first else []

    async def recovered(self) -> None:
        """One model, drawn, answers rightly again."""
        model, began = self.random.choice(self.models), monotonic()
        while monotonic() < began + RECOVERY_SECS:
            answer = await client.ask(model, "recovered?", tokens=4, timeout=ANSWER_SECS)
            if answer.ok:
                self.recovery = max(self.recovery, monotonic() - began)
                return
            await asyncio.sleep(0.2)
        self.wrong.append(
            f"{model} does not answer {RECOVERY_SECS:g} s after: {answer.error[:300]}"
        )

    async def rest(self) -> None:
        """The clients pause, everything comes to rest, and llmux's word is compared."""
        self._asking.clear()
        await self.blows.settle()
        async with self._pause:
            await self._pause.wait_for(lambda: self._busy == 0)
        said, busy = await asyncio.to_thread(invariants.at_rest, self.models)
        self.wrong += [f"does not come to rest: {one}" for one in busy]
        if not busy:
            wrong = await asyncio.to_thread(invariants.lies, said)
            self.wrong += [f"at rest: {one}" for one in wrong]
        restarts = int(await asyncio.to_thread(witness.show, witness.SUPERVISOR, "NRestarts"))
        if restarts > self.blows.restarts:
            self.wrong.append(
                f"the supervisor ended {restarts - self.blows.restarts} times unasked"
            )
            self.blows.restarts = restarts
        self._asking.set()

    async def run(self, count: int, clients: int, *, go_on: bool) -> dict[str, Any]:
        for model in self.models:
            first = await client.ask(model, "warm up", timeout=ANSWER_SECS)
            if not first.ok:
                raise witness.WitnessError(f"cannot begin: {first.error}")
        asking = [asyncio.create_task(self._client(number)) for number in range(clients)]
        await self.rest()
        before = self._footprints()
        while len(self.struck) < count and (go_on or not self.wrong):
            await self.strike()
            await self.recovered()
            if len(self.struck) % REST_EVERY == 0:
                await self.rest()
        await self.rest()
        after = self._footprints()
        self._over = True
        _, stuck = await asyncio.wait(asking, timeout=ANSWER_SECS + 5)
        if stuck:
            self.wrong.append(f"{len(stuck)} clients were never answered")
        return {
            "blows": dict(sorted(Counter(blow.name for blow in self.struck).items())),
            "answers": dict(self.answers),
            "longest_secs": round(self.longest, 3),
            "longest_recovery_secs": round(self.recovery, 3),
            "before": before,
            "after": after,
            "violations": self.wrong,
            "last_blows": [str(blow) for blow in self.struck[-10:]],
        }

    def _footprints(self) -> dict[str, dict[str, int]]:
        return {unit: invariants.footprint(unit) for unit in (witness.SUPERVISOR, witness.GATEWAY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--blows", type=int, required=True)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--go-on", action="store_true", help="do not end at the first violation")
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()

    async def chaos() -> dict[str, Any]:
        run = Chaos(arguments.seed, tuple(arguments.models))
        return await run.run(arguments.blows, arguments.clients, go_on=arguments.go_on)

    print(json.dumps(asyncio.run(chaos())))


if __name__ == "__main__":
    main()
