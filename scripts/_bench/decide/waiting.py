"""Thousands of requests that wait for models that get no room: memory and CPU of `llmux serve`.

One process is supervisor and gateway, and holds every client's connection. One model has the only
GPU and is never evicted; all others are waited for.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import resource
import shutil
import sys
import tempfile
from time import monotonic
from typing import Any

from _bench.load_http import connect, request_bytes
from _bench.switch import machine

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/service"))

SERVED = "served"
TIMEOUT_SECS = 3600  # of a request: none ends while it is measured
AT_ONCE = 100  # clients that connect together
PATIENCE_SECS = 600.0


def measure(models: int, requests: int, seconds: float) -> dict[str, Any]:
    from daemon_harness import Daemon  # from tests/service

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the daemon inherits it
    directory = pathlib.Path(tempfile.mkdtemp(prefix="lxw"))
    names = [f"m{number:03}" for number in range(models)]
    daemon = Daemon(
        directory,
        {SERVED: {"never_evict": True}} | {name: {} for name in names},
        policy={"policy_type": "fair", "request_timeout_secs": TIMEOUT_SECS},
        top={"gateway": {"max_waiting": requests, "max_connections": 2 * requests}},
        answer_secs=300.0,  # while thousands of requests are read
        own_interpreter=True,
    )
    try:
        daemon.start()
        daemon.load(SERVED)
        return asyncio.run(crowd(daemon, names, requests, seconds))
    finally:
        if daemon.alive:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def crowd(daemon: Any, names: list[str], requests: int, seconds: float) -> dict[str, Any]:
    pid = daemon.process.pid
    empty = rss_mib(pid)
    began = monotonic()
    writers = []
    for first in range(0, requests, AT_ONCE):
        pairs = await asyncio.gather(
            *(connect(daemon.http) for _ in range(first, min(first + AT_ONCE, requests)))
        )
        for number, (_, writer) in enumerate(pairs, first):
            writer.write(request_bytes(names[number % len(names)]))
            writers.append(writer)
        # Not all at once: the head of a request must be read in time, on a busy machine too.
        while (waiting := waiting_in(daemon)) < len(writers):
            if monotonic() > began + PATIENCE_SECS:
                raise SystemExit(f"bench: {waiting} of {len(writers)} requests wait")
            await asyncio.sleep(0.05)
    all_there = monotonic() - began
    await asyncio.sleep(5.0)  # what followed the last request is over
    before, since = processor_secs(pid), monotonic()
    await asyncio.sleep(seconds)
    used, passed = processor_secs(pid) - before, monotonic() - since
    result = {
        "models": len(names),
        "waiting": waiting_in(daemon),
        "all_wait_after_secs": round(all_there, 1),
        "rss_mib_before": empty,
        "rss_mib": rss_mib(pid),
        "idle_cpu_percent": round(100 * used / passed, 3),
        "idle_secs": round(passed, 1),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
    }
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)  # which closes them
    daemon.until(lambda: waiting_in(daemon) == 0)
    return result


def waiting_in(daemon: Any) -> int:
    return sum(model["queue_depth"] for model in daemon.status()["models"].values())


def processor_secs(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return round(int(status.partition("VmRSS:")[2].split()[0]) / 1024, 1)
