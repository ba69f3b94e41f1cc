"""New requests at a steady pace, and streams, while systemd restarts the gateway; prints a report.

Open loop: a request is made every few milliseconds whether or not the ones before were answered.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from time import monotonic

import client
import witness

EVERY_SECS = 0.03
STREAM_TOKENS = 250  # of 10 a second: longer than several restarts


async def run(streams: int, restarts: int) -> dict[str, object]:
    first = await client.ask("alpha", "before")
    if not first.ok:
        raise witness.WitnessError(f"cannot begin: {first.error}")
    over = asyncio.Event()
    asked: list[asyncio.Task[client.Answer]] = []
    flowing = [
        asyncio.create_task(client.ask("alpha", f"stream {at}", tokens=STREAM_TOKENS, stream=True))
        for at in range(streams)
    ]

    async def pour() -> None:
        while not over.is_set():
            asked.append(asyncio.create_task(client.ask("alpha", f"new {len(asked)}", tokens=2)))
            await asyncio.sleep(EVERY_SECS)

    pouring = asyncio.create_task(pour())
    mains, took = [witness.main_pid(witness.GATEWAY)], []
    for _ in range(restarts):
        await asyncio.sleep(1.0)
        began = monotonic()
        restart = ["systemctl", "restart", witness.GATEWAY]
        await asyncio.to_thread(subprocess.run, restart, check=True)
        took.append(round(monotonic() - began, 2))
        mains.append(witness.main_pid(witness.GATEWAY))
    still_flowing = sum(not stream.done() for stream in flowing)
    processes = len(list(witness.processes(witness.SLICE / witness.GATEWAY)))
    await asyncio.sleep(1.0)
    over.set()
    await pouring
    answers = await asyncio.gather(*asked)
    whole = await asyncio.gather(*flowing)
    return {
        "requests": len(answers),
        "failed": [answer.error for answer in answers if not answer.ok],
        "longest_ms": round(max(answer.seconds for answer in answers) * 1000),
        "streams_over_the_restarts": still_flowing,
        "cut": [answer.error for answer in whole if not answer.ok],
        "gateways": len(set(mains)),
        "processes_at_the_end": processes,
        "restart_secs": took,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(int(sys.argv[1]), int(sys.argv[2])))))
