"""Eight models share four simulated GPUs: switches at random, with faults. Prints a JSON report.

    gpus.py SWITCHES SEED

The engines judge the whole device as vLLM does (device-checks), so a start, sleep or wake beside
another engine's fails there. Faults are of the kinds that an orderly supervisor must bear without
such a failure: engines that answer errors, die in their own transition or are not what they were
after it, a CUDA restore that fails, an NVML that is late or stands still, the supervisor killed. An
engine of CUDA is never made to end by itself: that would hang a real host, whatever llmux does.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from time import monotonic

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "load"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import client
import invariants
import witness
from overlap import Words
from vllm_standin import faults

GPU = pathlib.Path("/var/tmp/gpu")
CUDA = pathlib.Path("/var/tmp/cuda")
NVML = pathlib.Path("/var/tmp/nvml")
COMPLAINTS = GPU / "ledger.json.complaints"
CLIENTS = 6
FAULT_EVERY_SECS = 1.5
HONEST = {"429", "502", "503", "504"}  # a model that failed is refused for a moment
SERVES = " serves after "

HARMLESS = ({"sleep_error": 1}, {"wake_error": 1}, {"reload_error": 1}, {"slow_sleep_secs": 0.3},
            {"slow_wake_secs": 0.3}, {"wrong_after_wake": True}, {"startup_secs": 0.3})  # fmt: skip
DEATHS = ({"die_on": "sleep"}, {"die_on": "wake"}, {"die_at_start": True}, {"leak_on_sleep": True})


class Run:
    """``of_cuda``: models whose engines are CUDA processes to llmux."""

    def __init__(self, switches: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.switches = switches
        self.words = Words()
        self.models = sorted(witness.states())
        said = invariants.status()
        assert said is not None
        ways = {name: one["eviction"] for name, one in said["models"].items()}
        self.of_cuda = {n for n, way in ways.items() if way.endswith(("suspend", "checkpoint"))}
        self.answers: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._over = False
        self._healing: set[asyncio.Task[None]] = set()

    # ---- clients ----------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        mine = random.Random(number)
        while not self._over:
            answer = await client.ask(mine.choice(self.models), f"gpus {mine.random()}", tokens=8)
            status = answer.error.partition("WrongAnswerError: status ")[2][:3]
            kind = "right" if answer.ok else status or "cut"
            self.answers[kind] += 1
            if status and status not in HONEST:
                self.wrong.append(f"{answer.model}: {answer.error}")
            if not answer.ok:
                await asyncio.sleep(0.05)  # as a client backs off

    # ---- faults -----------------------------------------------------------------------------

    async def _trouble(self) -> None:
        while not self._over:
            await asyncio.sleep(FAULT_EVERY_SECS)
            draw = self.random.random()
            if draw < 0.6:
                self._of_an_engine()
            elif draw < 0.75:
                self._of_a_file("a CUDA restore fails", CUDA / "faults" / "restore", "fail 999")
            elif draw < 0.9:
                self._nvml_stands_still()
            else:
                await self._supervisor_ends()

    def _of_an_engine(self) -> None:
        model = self.random.choice(self.models)
        kinds = HARMLESS if model in self.of_cuda else HARMLESS + DEATHS
        order = self.random.choice(kinds)
        path = str(GPU / f"{model}.faults")
        faults.order(path, **order)
        self.faults[next(iter(order))] += 1
        self._later(lambda: faults.order(path))

    def _of_a_file(self, name: str, path: pathlib.Path, words: str) -> None:
        path.write_text(words + "\n")
        self.faults[name] += 1
        self._later(lambda: path.unlink(missing_ok=True))

    def _nvml_stands_still(self) -> None:
        path = NVML / "faults" / "processes"
        fifo = pathlib.Path(f"{path}.fifo")

        def release() -> None:
            path.unlink(missing_ok=True)
            os.close(os.open(fifo, os.O_RDWR))  # calls that hang go on

        path.write_text("hang\n")
        self.faults["NVML stands still"] += 1
        self._later(release)

    def _later(self, heal: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(1.0)
            heal()

        task = asyncio.ensure_future(wait())
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)

    async def _supervisor_ends(self) -> None:
        main = await asyncio.to_thread(witness.main_pid, witness.SUPERVISOR)
        if main:
            os.kill(main, signal.SIGKILL)
            self.faults["the supervisor is killed"] += 1
            await asyncio.to_thread(witness.gone, [main], 20.0)

    # ---- the run ----------------------------------------------------------------------------

    async def run(self) -> dict[str, object]:
        began = monotonic()
        tasks = [asyncio.ensure_future(self._client(number)) for number in range(CLIENTS)]
        tasks.append(asyncio.ensure_future(self._trouble()))
        done = 0
        while done < self.switches:
            await asyncio.sleep(0.3)
            self.wrong += await asyncio.to_thread(invariants.ledger_faults)
            done = await asyncio.to_thread(self.words.count, SERVES)
            if monotonic() - began > 60 + 3 * self.switches:
                self.wrong.append(f"{done} switches only")
                break
        self._over = True
        await asyncio.gather(*tasks)
        await asyncio.gather(*self._healing)
        said, busy = await asyncio.to_thread(invariants.at_rest, tuple(self.models))
        self.wrong += busy + invariants.lies(said) + witness.strays(self.models)
        if COMPLAINTS.exists():
            self.wrong += COMPLAINTS.read_text().splitlines()
        return {
            "wrong": self.wrong,
            "switches": done,
            "secs": round(monotonic() - began, 1),
            "answers": self.answers,
            "faults": self.faults,
            "out_of_memory": self.words.count("CUDA out of memory"),
            "hosts_hung": hosts_hung(),
        }


def hosts_hung() -> list[str]:
    """Processes that ended with their restored CUDA state on the GPU."""
    marked = CUDA / "host_hung"
    found = marked.read_text().split() if marked.exists() else []
    dead = [
        path.name for path in (CUDA / "restored").glob("*") if not witness.living([int(path.name)])
    ]
    return found + dead


def main(switches: str, seed: str) -> dict[str, object]:
    return asyncio.run(Run(int(switches), int(seed)).run())


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
