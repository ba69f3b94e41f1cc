"""Models that are parked and woken in turns: after each step the system is as the table says.

    parked.py ROUNDS MODEL=WEIGHTS+PROCESS…

A model is parked by an order where its way of parking makes no room, else by the request for the
next one. Prints a JSON report; ``wrong`` says what was not as it must be.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import sys

import client
import witness

# process axis → is there a tree, is it frozen, has it the pids it had
PROCESSES = {
    "keep_running": (True, False, True),
    "freeze": (True, True, True),
    "cuda_suspend": (True, True, True),
    "checkpoint": (False, False, True),
    "stop": (False, False, False),
}
RAM_FREED = 0.8  # of the weights; the rest is Python's own coming and going


def gpu_kinds_kept(weights: str, process: str) -> set[str]:
    if process in ("cuda_suspend", "checkpoint", "stop"):
        return set()
    return {"context", "weights", "kv"} if weights == "retain" else {"context"}


def resident(pids: set[int]) -> int:
    """Bytes; shared pages count once per process, which is the same before and after."""
    pages = 0
    for pid in pids:
        pages += int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Parked:
    """What was seen of each model while it served."""

    def __init__(self, models: dict[str, str]) -> None:
        self.models = {name: tuple(how.split("+")) for name, how in models.items()}
        self.pids: dict[str, set[int]] = {}
        self.resident: dict[str, int] = {}
        self.wrong: list[str] = []
        self.freed_ram: dict[str, int] = {}

    async def serve(self, name: str, prompt: str) -> None:
        answer = await client.ask(name, prompt, stream=True)
        if not answer.ok:
            raise witness.WitnessError(f"{name}, {prompt}: {answer.error}")
        kinds = witness.held().get(name, {}).keys()
        if not {"context", "weights", "kv"} <= kinds:
            self.wrong.append(f"{name} serves with {set(kinds)}")
        pids = witness.scopes().get(name, set())
        keeps = PROCESSES[self.models[name][1]][2]
        if name in self.pids and keeps and pids != self.pids[name]:
            self.wrong.append(f"{name} woke as {sorted(pids)}, was {sorted(self.pids[name])}")
        if name in self.pids and not keeps and pids & self.pids[name]:
            self.wrong.append(f"{name} was to be stopped and has pids of before")
        self.pids[name] = pids
        self.resident[name] = resident(pids)

    def park(self, name: str) -> None:
        subprocess.run(["llmux", "sleep", name], stdout=subprocess.PIPE, check=True)

    def look(self, name: str, weights_bytes: int) -> None:
        weights, process = self.models[name]
        lives, frozen, _ = PROCESSES[process]
        resting = {"parked", "stopped"}
        witness.until(f"{name} is at rest", lambda: witness.states().get(name) in resting)
        kinds = set(witness.held().get(name, {}))
        if not kinds <= gpu_kinds_kept(weights, process):
            self.wrong.append(f"{name} parked by {weights}+{process} holds {kinds}")
        pids = witness.scopes().get(name, set())
        if bool(pids) != lives:
            self.wrong.append(f"{name} parked by {process} has processes {sorted(pids)}")
        if lives and witness.frozen(name) != frozen:
            self.wrong.append(f"{name} parked by {process} is {'not ' * frozen}frozen")
        if not lives and (left := witness.living(self.pids[name])):
            self.wrong.append(f"{name} parked by {process} left {sorted(left)}")
        if lives:
            freed = self.resident[name] - resident(pids)
            self.freed_ram[name] = freed
            if weights == "discard" and freed < RAM_FREED * weights_bytes:
                self.wrong.append(f"{name} freed {freed >> 20} MiB of RAM only")


async def main(rounds: int, models: dict[str, str], weights_bytes: int) -> dict[str, object]:
    parked = Parked(models)
    for at in range(rounds):
        for name, how in models.items():
            await parked.serve(name, f"round {at}")
            if how in ("retain+keep_running", "retain+freeze"):
                parked.park(name)  # no other model gains by it
                parked.look(name, weights_bytes)
            for other in models:
                if other != name and other in parked.pids:
                    parked.look(other, weights_bytes)
    return {
        "wrong": [*parked.wrong, *witness.strays(models)],
        "rounds": rounds,
        "freed_ram_mib": {name: freed >> 20 for name, freed in parked.freed_ram.items()},
    }


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[3:])
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), given, int(sys.argv[2]) << 20))))
