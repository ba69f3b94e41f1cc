"""Five times what the engines can do, for a minute: what becomes of everybody, and of the memory.

The whole of llmux runs as `llmux serve` with the stand-in engine; its capacity is measured first,
by clients in a closed loop. Then requests come in an open loop at five times that rate. Two scenes:
one model that is resident, and two that take turns on one GPU. After them 1,000 clients wait for a
model that is not resident, and leave.

The real wait of a request that was turned away is the time from then until the answer to the first
request for the same model that was sent after it and was accepted: what a client would have waited
that had sent its request again and again without a pause. (It is an upper bound of how early a
single later attempt can be answered, and no promise that one later attempt is accepted: while the
overload lasts most are not.) The error of a Retry-After is its distance from that, as a share of
it. Requests turned away so late that no later one was accepted have no real wait and are
counted apart. Memory is the anonymous memory of the one process that is supervisor and gateway, and
flat means: in the last third of the time not more than 5 % above its median in the second.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import datetime
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections import Counter
from statistics import median
from time import monotonic
from typing import Any

from _bench.load_http import Outcome, closed_loop, connect, open_loop, request_bytes
from _bench.switch import machine

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/service"))

HELP = "five times the capacity for a minute: Retry-After, memory, clients that leave"
TIMES = 5
PLACES = 16  # gateway.max_in_flight
ANSWER_SECS = 0.2  # of the stand-in
WAITING = 400  # gateway.max_waiting
LEAVERS = 1000
GOAL_ERROR = 0.5
GOAL_GROWTH = 0.05
SCENES = {"resident": ("alpha",), "turns": ("alpha", "beta")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload, each scene")


def run(arguments: argparse.Namespace) -> int:
    results = {}
    for name, models in SCENES.items():
        results[name] = with_daemon(lambda d, m=models: overload(d, m, arguments.seconds))
        print_scene(name, results[name])
    results["leaving"] = with_daemon(leaving)
    print_leaving(results["leaving"])
    met = all(goal for result in results.values() for goal in result["goals"].values())
    document = {
        "scenes": results,
        "times": TIMES,
        "method": " ".join((__doc__ or "").split()),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0 if met else 1


def with_daemon(work: Any) -> dict[str, Any]:
    """``work`` with an `llmux serve` of its own, both models ready to be woken."""
    from daemon_harness import Daemon  # from tests/service

    directory = pathlib.Path(tempfile.mkdtemp(prefix="lxo"))
    speed = {"STANDIN_TTFT_SECS": str(ANSWER_SECS), "STANDIN_SLEEP_SECS": "0.3",
             "STANDIN_WAKE_SECS": "0.5"}  # fmt: skip
    waiting = LEAVERS if work is leaving else WAITING
    limits = {"max_in_flight": PLACES, "max_waiting": waiting}
    daemon = Daemon(
        directory,
        {name: {"env": speed} for name in ("alpha", "beta")},
        policy={"min_active_secs": 3, "request_timeout_secs": 120},
        top={"gateway": limits},
        own_interpreter=True,
    )
    try:
        daemon.start()
        for name in ("beta", "alpha"):
            daemon.load(name)
        result: dict[str, Any] = asyncio.run(work(daemon))
        return result
    finally:
        if daemon.alive:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)


# ---- five times the capacity --------------------------------------------------------------------


async def overload(daemon: Any, models: tuple[str, ...], seconds: float) -> dict[str, Any]:
    clients = 2 * PLACES * len(models)
    measured = await closed_loop(daemon.http, models, clients, 24.0 if len(models) > 1 else 6.0)
    span = max(one.ended for one in measured) - min(one.sent for one in measured)
    capacity = sum(one.status == 200 for one in measured) / span
    began = monotonic()
    memory: list[tuple[float, int]] = []
    watching = asyncio.create_task(watch_memory(daemon.process.pid, began, memory))
    outcomes = await open_loop(daemon.http, models, TIMES * capacity, seconds)
    watching.cancel()
    daemon.until(lambda: not any(m["in_flight"] + m["queue_depth"] for m in status_of(daemon)))
    return summary(outcomes, capacity, seconds, memory)


def status_of(daemon: Any) -> list[dict[str, Any]]:
    return list(daemon.status()["models"].values())


async def watch_memory(pid: int, began: float, into: list[tuple[float, int]]) -> None:
    while True:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()  # noqa: ASYNC240  # no disk
        into.append((monotonic() - began, int(status.partition("RssAnon:")[2].split()[0]) * 1024))
        await asyncio.sleep(0.5)


def summary(
    outcomes: list[Outcome], capacity: float, seconds: float, memory: list[tuple[float, int]]
) -> dict[str, Any]:
    accepted = [one for one in outcomes if not one.turned_away]
    failed = [one for one in accepted if one.status != 200 or one.error]
    turned = [one for one in outcomes if one.turned_away]
    untold = sum(one.retry_after is None for one in turned)
    waits, late = real_waits(turned, [one for one in accepted if one.status == 200])
    pairs = [(one.retry_after, wait, one.status) for one, wait in waits if one.retry_after]
    errors = {
        str(code): round(median(found), 3)
        for code in (429, 503)
        if (found := [abs(told - wait) / wait for told, wait, status in pairs if status == code])
    }
    whole = [abs(told - wait) / wait for told, wait, _ in pairs]
    middle = [size for at, size in memory if seconds / 3 <= at < seconds * 2 / 3]
    end = [size for at, size in memory if seconds * 2 / 3 <= at <= seconds]
    growth = max(end) / median(middle) - 1 if middle and end else 0.0
    error = median(whole) if whole else 0.0
    return {
        "capacity_per_s": round(capacity, 1),
        "sent": len(outcomes),
        "sent_per_s": round(len(outcomes) / max(seconds, 1e-9), 1),
        "statuses": dict(Counter(str(one.status) for one in outcomes)),
        "accepted": len(accepted),
        "accepted_not_finished": len(failed),
        "failures": sorted({f"{one.status} {one.error}" for one in failed})[:5],
        "without_retry_after": untold,
        "without_real_wait": late,
        "retry_after_median_s": median([told for told, _, _ in pairs]) if pairs else None,
        "real_wait_median_s": round(median([w for _, w, _ in pairs]), 2) if pairs else None,
        "retry_after_error_median": round(error, 3),
        "retry_after_error_median_by_status": errors,
        "retry_after_error_p90": round(sorted(whole)[int(len(whole) * 0.9)], 3) if whole else None,
        "memory_mib": [round(median(middle) / 2**20, 1), round(max(end) / 2**20, 1)],
        "memory_growth": round(growth, 4),
        "goals": {
            "every accepted request finishes": not failed,
            "all others are told when to come back": bool(turned) and not untold,
            "median error of Retry-After < 50 %": error < GOAL_ERROR,
            "memory is flat": growth < GOAL_GROWTH,
        },
    }


def real_waits(
    turned: list[Outcome], answered: list[Outcome]
) -> tuple[list[tuple[Outcome, float]], int]:
    """(each that was turned away with its real wait; how many have none)."""
    by_model: dict[str, list[Outcome]] = {}
    for one in sorted(answered, key=lambda one: one.sent):
        by_model.setdefault(one.model, []).append(one)
    waits = []
    for one in turned:
        later = by_model.get(one.model, [])
        at = bisect.bisect_left(later, one.ended, key=lambda other: other.sent)
        if at < len(later):
            waits.append((one, later[at].ended - one.ended))
    return waits, len(turned) - len(waits)


# ---- clients that leave -------------------------------------------------------------------------


async def leaving(daemon: Any) -> dict[str, Any]:
    """While alpha streams, LEAVERS clients wait for beta and leave: no switch comes of them."""
    before = switches(daemon)
    reader, writer = await connect(daemon.http)
    daemon.order("alpha", tokens_per_sec=50)
    writer.write(request_bytes("alpha", tokens=3000, stream=True))  # longer than all of this
    await reader.readuntil(b"data: ")
    data = request_bytes("beta")
    crowd = []
    for _ in range(LEAVERS):
        _, one = await connect(daemon.http)
        one.write(data)
        crowd.append(one)
    daemon.until(lambda: daemon.model("beta")["queue_depth"] == LEAVERS)
    for one in crowd:
        one.transport.abort()
    await asyncio.sleep(0)  # which closes them
    daemon.until(lambda: daemon.model("beta")["queue_depth"] == 0)
    daemon.order("alpha", tokens_per_sec=0)  # now to its end
    rest = await reader.read()
    writer.transport.abort()
    after = daemon.model("beta")
    made = switches(daemon) - before
    return {
        "clients": LEAVERS,
        "switches": made,
        "state_of_their_model": after["state"],
        "stream_beside_them_whole": b"data: [DONE]" in rest,
        "goals": {
            "no switch on their behalf": made == 0 and after["state"] == "parked",
            "the stream beside them is whole": b"data: [DONE]" in rest,
        },
    }


def switches(daemon: Any) -> int:
    """All that were ever made."""
    text = daemon.request("GET", "/metrics").body.decode()
    lines = [line for line in text.splitlines() if line.startswith("llmux_switches_total{")]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


# ---- for people ---------------------------------------------------------------------------------


def print_scene(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: {', '.join(SCENES[name])}")
    for key, value in result.items():
        if key != "goals":
            print(f"  {key:38} {value}")
    _print_goals(result)


def print_leaving(result: dict[str, Any]) -> None:
    print("\nclients that leave while they wait")
    for key, value in result.items():
        if key != "goals":
            print(f"  {key:38} {value}")
    _print_goals(result)


def _print_goals(result: dict[str, Any]) -> None:
    for goal, met in result["goals"].items():
        print(f"  {'PASS' if met else 'MISS'}  {goal}")
