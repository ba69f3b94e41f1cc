"""What a scrape of 50 models costs: GET /metrics at the gateway and at metrics_port.

The whole of llmux runs as `llmux serve`, supervisor and gateway in one process, which makes a
scrape slower, not faster, than with the two services apart. All 50 models have served and so have
all their series; some are resident, and their engines' /metrics is as long as that of vLLM 0.32
(its 42 families with their buckets, and what Prometheus' Python client and the HTTP server add).
A cold scrape asks the engines, as one every 15 s does; a warm one comes within the 2 s for which
their answers are kept. Peak memory is the process's high-water mark after all scrapes, beside its
memory before them. Beside the cold scrapes, and as long without any, a short request is sent again
and again on a connection of its own: what a scrape costs the others is the longest of those.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from typing import Any

from _bench.switch import machine

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/service"))

HELP = "median and p99 of a scrape of 50 models, and its memory"
GOAL_MS = 150.0  # prometheus_client takes 2 to 6 µs for each of its ten thousand lines
BYSTANDER_GOAL_MS = 10.0  # a portion of them and a turn of the loop
APART_SECS = 2.05  # the gateway keeps engines' answers for two seconds

# vLLM 0.32, v1/metrics/loggers.py: families and how many samples or buckets each has
NUMBERS = {"gauge": (12, 3), "counter": (23, 3)}  # families, samples of each
HISTOGRAMS, BUCKETS = 19, 21
OTHER_LINES = 110  # python_*, process_* and http_*, which are not passed on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--resident", type=int, default=8, help="models whose engines are asked")
    parser.add_argument("--cold", type=int, default=100, help="scrapes that ask the engines")
    parser.add_argument("--warm", type=int, default=500, help="scrapes one after the other")


def run(arguments: argparse.Namespace) -> int:
    from daemon_harness import Daemon  # from tests/service

    directory = pathlib.Path(tempfile.mkdtemp(prefix="lxs"))
    text = directory / "metrics.txt"
    text.write_text(engine_metrics())
    names = [f"model-{at:02}" for at in range(arguments.models)]
    claim = round(0.9 / arguments.resident, 3)
    settings = {
        "gpu_memory": claim,
        "extra_args": ["--gpu-memory-utilization", str(claim)],
        "env": {"STANDIN_METRICS_FILE": str(text)},
        "eviction": "retain+stop",
    }
    port = free_port()
    daemon = Daemon(
        directory, dict.fromkeys(names, settings), top={"metrics_port": port}, own_interpreter=True
    )
    try:
        daemon.start()
        for name in names:
            if daemon.chat(name).status != 200:
                raise SystemExit(
                    f"bench: {name} does not answer\n" + "\n".join(daemon.log.since(0))
                )
        result = measure(daemon, port, arguments)
    finally:
        if daemon.alive:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)
    document = {
        **result,
        "models": arguments.models,
        "goal_ms": GOAL_MS,
        "method": " ".join((__doc__ or "").split()),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print_table(document)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(document["goals"].values()) else 1


def measure(daemon: Any, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    pid = daemon.process.pid
    before = memory(pid, "VmRSS")
    cold: dict[str, list[float]] = {"gateway": [], "metrics_port": []}
    warm: dict[str, list[float]] = {"gateway": [], "metrics_port": []}
    ways = {
        "gateway": lambda: daemon.connection(),
        "metrics_port": lambda: closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)),
    }
    body = ""
    with Bystander(daemon) as bystander:
        for at in range(arguments.cold):
            bystander.pause(APART_SECS / 2)
            bystander.begin("before a scrape")
            bystander.pause(APART_SECS / 2)
            bystander.begin("during a scrape")
            way = ("gateway", "metrics_port")[at % 2]
            seconds, body = scrape(ways[way])
            bystander.begin(None)
            cold[way].append(seconds)
    for way, connect in ways.items():
        for _ in range(arguments.warm // 2):
            warm[way].append(scrape(connect)[0])
    lines = body.splitlines()
    passed_on = sum(line.startswith("vllm:") for line in lines)
    resident = len({line.partition('model="')[2].partition('"')[0] for line in lines
                    if line.startswith("vllm:num_requests_running{")})  # fmt: skip
    figures = {
        f"{kind} {way}": spread(values)
        for kind, times in (("cold", cold), ("warm", warm))
        for way, values in times.items()
    }
    return {
        "scrape_ms": figures,
        "bystander_ms": {name: spread(values) for name, values in bystander.seconds.items()},
        "bytes": len(body),
        "lines": len(lines),
        "engines_asked": resident,
        "engine_bytes": len(engine_metrics()),
        "engine_lines_passed_on": passed_on,
        "memory_before_mib": round(before / 1024, 1),
        "memory_peak_mib": round(memory(pid, "VmHWM") / 1024, 1),
        "goals": {
            f"median of {name} < {GOAL_MS:g} ms": values["p50"] < GOAL_MS
            for name, values in figures.items()
        }
        | {
            f"median of another request during a scrape < {BYSTANDER_GOAL_MS:g} ms": spread(
                bystander.seconds["during a scrape"]
            )["p50"]
            < BYSTANDER_GOAL_MS
        },
    }


class Bystander:
    """A client that asks for the shortest answer without a pause, to see what holds it up."""

    def __init__(self, daemon: Any) -> None:
        self.seconds: dict[str, list[float]] = {"before a scrape": [], "during a scrape": []}
        self._daemon = daemon
        self._phase: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self, phase: str | None) -> None:
        self._phase = phase

    def pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _run(self) -> None:
        with self._daemon.connection() as connection:
            while not self._stop.is_set():
                phase = self._phase
                began = time.perf_counter()
                connection.request("GET", "/health/live")
                connection.getresponse().read()
                seconds = time.perf_counter() - began
                during = "during a scrape"
                phase = during if during in (phase, self._phase) else self._phase
                if phase is not None:
                    self.seconds[phase].append(seconds)
                self._stop.wait(0.001)


def scrape(connect: Any) -> tuple[float, str]:
    """Seconds of one on a connection of its own, and what it brought."""
    with connect() as connection:
        began = time.perf_counter()
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        body = answer.read()
        seconds = time.perf_counter() - began
    if answer.status != 200:
        raise SystemExit(f"bench: /metrics answered {answer.status}")
    return seconds, body.decode()


def closing(connection: http.client.HTTPConnection) -> Any:
    import contextlib

    return contextlib.closing(connection)


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds by the nearest rank."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    shown = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[round(last * part)] * 1000, 1) for name, part in shown.items()}


def memory(pid: int, field: str) -> int:
    """KiB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def engine_metrics() -> str:
    """As long as vLLM's own, besides the few families that the stand-in has itself."""
    labels = 'engine="0",model_name="some/model-name"'
    lines = []
    for kind, (families, samples) in NUMBERS.items():
        for family in range(families):
            name = f"vllm:bench_{kind}_{family}"
            lines += [
                f"# HELP {name} A family of vLLM's, with a sentence.",
                f"# TYPE {name} {kind}",
            ]
            lines += [f'{name}{{{labels},part="{at}"}} {at * 12345.0}' for at in range(samples)]
    for family in range(HISTOGRAMS):
        name = f"vllm:bench_histogram_{family}_seconds"
        lines += [f"# HELP {name} A family of vLLM's.", f"# TYPE {name} histogram"]
        bounds = [*(f"{at * 0.25}" for at in range(BUCKETS - 1)), "+Inf"]
        lines += [
            f'{name}_bucket{{{labels},le="{bound}"}} {at * 999.0}'
            for at, bound in enumerate(bounds)
        ]
        last = (BUCKETS - 1) * 999.0
        lines += [f"{name}_count{{{labels}}} {last}", f"{name}_sum{{{labels}}} 98765.4321"]
    lines += [f'python_or_http_thing_{at}{{handler="/v1/x",method="POST"}} {at}.0'
              for at in range(OTHER_LINES)]  # fmt: skip
    return "\n".join(lines) + "\n"


def print_table(document: dict[str, Any]) -> None:
    print(f"{document['models']} models, {document['engines_asked']} resident; an answer has "
          f"{document['lines']} lines, {document['bytes'] / 1e6:.2f} MB, "
          f"{document['engine_lines_passed_on']} lines of engines")  # fmt: skip
    print(f"  {'milliseconds':24}{'p50':>8}{'p99':>8}{'max':>8}")
    for name, values in document["scrape_ms"].items():
        print(f"  {name:24}" + "".join(f"{values[p]:8.1f}" for p in ("p50", "p99", "max")))
    for name, values in document["bystander_ms"].items():
        shown = f"another, {name}"
        print(f"  {shown:24}" + "".join(f"{values[p]:8.1f}" for p in ("p50", "p99", "max")))
    print(f"  memory {document['memory_before_mib']} MiB before, "
          f"{document['memory_peak_mib']} MiB at its peak")  # fmt: skip
    for goal, met in document["goals"].items():
        print(f"  {'PASS' if met else 'MISS'}  {goal}")
