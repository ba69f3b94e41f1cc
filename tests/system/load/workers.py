"""One of the gateway's workers is killed while streams run on all of them; prints a JSON report.

A worker is known by the beginning of its request ids. Streams of the one that died break; all of
the others must be whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
from collections import Counter

import client
import witness

STREAMS = 60
ROUNDS = 50
TOKENS = 200  # at 40 a second


def workers() -> list[int]:
    """The processes under the gateway's main process."""
    main = witness.main_pid(witness.GATEWAY)
    children = pathlib.Path(f"/proc/{main}/task/{main}/children").read_text()
    return [int(pid) for pid in children.split()]


async def spread(count: int) -> Counter[str]:
    """Who answers, of ``count`` requests at a time."""
    asked = (client.ask("alpha", f"who {at}", tokens=2) for at in range(count))
    answers = await asyncio.gather(*asked)
    failed = [answer.error for answer in answers if not answer.ok]
    if failed:
        raise witness.WitnessError(f"{len(failed)} requests failed: {failed[0]}")
    return Counter(answer.worker for answer in answers)


async def everybody(count: int) -> Counter[str]:
    """Requests by worker, until so many workers have answered one: they share one socket, and who
    wakes first accepts all that have come; the others come in when that one is busy."""
    seen: Counter[str] = Counter()
    for _ in range(ROUNDS):
        seen += await spread(STREAMS)
        if len(seen) == count:
            break
    return seen


async def streams_on_two(pids: list[int]) -> tuple[list[asyncio.Task[client.Answer]], int]:
    """Streams, as many as it takes until two workers have some; and the worker with most."""
    before = {pid: descriptors(pid) for pid in pids}
    streams: list[asyncio.Task[client.Answer]] = []
    for _ in range(ROUNDS):
        for at in range(len(streams), len(streams) + STREAMS // 3):
            asked = client.ask("alpha", f"stream {at}", stream=True, tokens=TOKENS)
            streams.append(asyncio.create_task(asked))
        await asyncio.to_thread(
            witness.until, f"{len(streams)} streams run", lambda: in_flight() == len(streams)
        )
        grown = sorted((descriptors(pid) - before[pid], pid) for pid in pids)
        if grown[-2][0] > 4:  # its connections to the engine count as well
            return streams, grown[-1][1]
    raise witness.WitnessError(f"one worker has all {len(streams)} streams")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def main() -> dict[str, object]:
    before = await everybody(3)
    old_main, old = witness.main_pid(witness.GATEWAY), workers()
    streams, victim = await streams_on_two(old)
    os.kill(victim, signal.SIGKILL)
    await asyncio.to_thread(witness.gone, [victim], 20.0)
    answers = await asyncio.gather(*streams)
    broken = [answer for answer in answers if not answer.ok]
    lost = {answer.worker for answer in broken} - {""}  # no name: it had not begun to answer
    survivors = Counter(answer.worker for answer in answers if answer.ok)
    await asyncio.to_thread(
        witness.until, "three workers again", lambda: len(set(workers())) == len(old)
    )
    after = await everybody(len(old))
    return {
        "workers": len(old),
        "requests_by_worker": sorted(before.values()),
        "streams": len(answers),
        "streams_by_worker": sorted(Counter(answer.worker for answer in answers).values()),
        "broken": len(broken),
        "broken_of_workers": len(lost),
        "broken_elsewhere": [a.error for a in broken if a.worker in survivors],
        "refused": sum(answer.refused for answer in answers),
        "same_parent": witness.main_pid(witness.GATEWAY) == old_main,
        "replaced": victim not in workers() and len(workers()) == len(old),
        "requests_by_worker_after": sorted(after.values()),
        "new_workers": len(set(after) - set(before)),
    }


def in_flight() -> int:
    import crowd

    return crowd.total("llmux_in_flight")


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
