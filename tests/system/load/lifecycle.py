"""Scenes from the service's life that must look and act without a pause; print a JSON report."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from time import monotonic

import client
import witness


async def must(model: str, prompt: str) -> None:
    answer = await client.ask(model, prompt, stream=True)
    if not answer.ok:
        raise witness.WitnessError(f"{model}: {answer.error}")


def systemctl(*words: str) -> None:
    subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, check=True)


async def start() -> dict[str, object]:
    """The first request, sent the moment that `systemctl start llmux` has returned."""
    began = monotonic()
    systemctl("start", "llmux")
    answer = await client.ask("alpha", "first")
    return {"error": answer.error, "start_secs": round(answer.started - began, 3)}


async def stop_and_start() -> dict[str, object]:
    """A supervisor stopped in good order leaves engines, and the workers that hold a grant."""
    await must("alpha", "before")
    await must("beta", "before")
    before = witness.scopes()
    began = monotonic()
    systemctl("stop", "llmux")
    stopped = monotonic() - began
    without = witness.scopes()
    resident = await client.ask("beta", "without a supervisor")
    waiting = asyncio.create_task(client.ask("alpha", "for the next supervisor"))
    systemctl("start", "llmux")
    served = await waiting
    return {
        "wrong": [e for e in (resident.error, served.error) if e] + witness.strays(before),
        "same": before == without == witness.scopes(),
        "stop_secs": round(stopped, 3),
    }


async def slice_stopped() -> dict[str, object]:
    """Nothing is left of llmux, and nothing on the GPU."""
    await must("alpha", "before")
    await must("beta", "before")
    everybody = witness.processes(witness.SLICE)
    began = monotonic()
    systemctl("stop", "llmux.slice")
    seconds = monotonic() - began
    return {
        "before": len(everybody),
        "left": sorted(witness.living(everybody)),
        "in_slice": sorted(witness.processes(witness.SLICE)),
        "strays": witness.strays(()),
        "held": witness.held(),
        "stop_secs": round(seconds, 3),
    }


async def watchdog() -> dict[str, object]:
    """A supervisor that stands still is replaced."""
    await must("alpha", "before")
    before = witness.scopes()
    old = witness.main_pid(witness.SUPERVISOR)
    began = monotonic()
    os.kill(old, signal.SIGSTOP)
    await asyncio.to_thread(witness.gone, [old], 30.0)
    seconds = monotonic() - began
    await must("beta", "after")  # a switch: needs the new one
    return {
        "replaced": witness.main_pid(witness.SUPERVISOR) not in (0, old),
        "same": before.items() <= witness.scopes().items(),
        "secs": round(seconds, 3),
    }


SCENARIOS = {
    "start": start,
    "stop-and-start": stop_and_start,
    "slice": slice_stopped,
    "watchdog": watchdog,
}

if __name__ == "__main__":
    print(json.dumps(asyncio.run(SCENARIOS[sys.argv[1]]())))
