"""New connections at a steady pace while the gateway and all its workers are killed and come back;
prints a JSON report.

Open loop: a connection is made every few milliseconds whether or not the ones before were answered,
so that many are made while no gateway runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from time import monotonic

import client
import witness

EVERY_SECS = 0.005


async def run() -> dict[str, object]:
    first = await client.ask("alpha", "before")
    if not first.ok:
        raise witness.WitnessError(f"cannot begin: {first.error}")
    over = asyncio.Event()
    asked: list[asyncio.Task[client.Answer]] = []

    async def pour() -> None:
        while not over.is_set():
            asked.append(asyncio.create_task(client.ask("alpha", f"drop {len(asked)}", tokens=4)))
            await asyncio.sleep(EVERY_SECS)

    pouring = asyncio.create_task(pour())
    old = witness.main_pid(witness.GATEWAY)
    all_old = list(witness.processes(witness.SLICE / witness.GATEWAY))  # the workers as well
    for pid in all_old:
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(witness.gone, all_old, 20.0)
    died = monotonic()
    ready = "active"
    await asyncio.to_thread(
        witness.until,
        "the gateway is active",
        lambda: (
            witness.show(witness.GATEWAY, "ActiveState") == ready
            and witness.main_pid(witness.GATEWAY) not in (0, old)
        ),
    )
    back = monotonic()
    over.set()
    await pouring
    answers = await asyncio.gather(*asked)
    failed = [answer for answer in answers if not answer.ok]
    # Whom one of them had accepted; who waited in the backlog is heard by the next one only.
    cut = [a for a in failed if a.started <= died and a.ended < back]
    return {
        "connections": len(answers),
        "made_while_no_gateway_ran": sum(died < a.started < back for a in answers),
        "refused": sum(a.refused for a in answers),
        "cut_by_the_kill": len(cut),
        "failed": [answer.error for answer in failed if answer not in cut],
        "away_ms": round((back - died) * 1000),
        "longest_ms": round(max(a.seconds for a in answers) * 1000),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run())))
