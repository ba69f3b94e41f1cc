"""The gateway beside nginx and LiteLLM's proxy: what each adds between clients and one engine.

The engine is a stub that costs next to nothing (proxies/stub.c), the clients are one light program
(proxies/load.c). Proxies run on one CPU, engine and clients on another; every proxy is started anew
in every round, the rounds interleave them, and figures are medians of the rounds. CPU is the
scheduler's account of the proxy's processes, divided by what they relayed. Added latency is the
proxied one minus that of the same clients at the engine itself in the same round. Streams are
measured twice: their chunks spread over the 20 ms, where most find the proxy idle and its wake-up
is in the figure, and all together, as one step of an engine gives them, where they queue up behind
one another. LiteLLM is given fewer streams, what one process of it can carry.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from _lab import host

from _bench.proxies import subjects
from _bench.proxies.report import document, print_table
from _bench.proxies.subjects import LOAD_CPU, MODEL, Engine, Start, Subject

HELP = "the gateway beside nginx and LiteLLM: CPU, latency, throughput, memory (two CPUs)"
STARTS: dict[str, Start] = {
    "direct": subjects.direct,
    "nginx": subjects.nginx,
    "llmux": subjects.llmux,
    "LiteLLM": subjects.litellm,
}
STREAMS = {"LiteLLM": 8}  # where not --streams
SHORT = {"LiteLLM": 1_000}  # requests without a stream a round, where not SHORT_REQUESTS
SHORT_REQUESTS = 100_000
CONNECTIONS = 64
FIRST_BYTES = 300
ARRIVALS = ("spread", "together")  # of the chunks within their 20 ms
SLOW = 50  # a chunk a second, where memory is looked at
MANY = {"LiteLLM": (64, 256)}  # streams held open at a time for that, where not …
MANY_STREAMS = (256, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of streaming, each round")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument(
        "--requests", type=int, default=1_000_000, help="for llmux's growth of memory; 0: leave out"
    )
    parser.add_argument(
        "--subject",
        choices=[name for name in STARTS if name != "direct"],
        action="append",
        help="may be repeated (default: all)",
    )


def run(arguments: argparse.Namespace) -> int:
    if len(subjects.CPUS) < 2:
        print("bench: needs two CPUs, one for the proxies and one for what is around them")
        return 2
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    names = ["direct", *(arguments.subject or [name for name in STARTS if name != "direct"])]
    load = os.getloadavg()[0]
    try:
        figures = measured(names, arguments)
    except host.LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    result = {
        **figures,
        "method": " ".join((__doc__ or "").split()),
        "versions": subjects.versions(),
        "load_average_before": load,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print_table(result)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measured(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llmux-bench-") as name:
        bench = Bench(pathlib.Path(name), arguments)
        rounds = [bench.round(names, number) for number in range(1, arguments.rounds + 1)]
        memory = {one: bench.memory(one) for one in names if one != "direct"}
        growth = bench.growth() if "llmux" in names and arguments.requests else None
    return document(rounds, memory, growth)


class Load:
    """The clients, at one address; see proxies/load.c for the commands."""

    def __init__(self, program: str, address: str) -> None:
        self._child = subprocess.Popen(
            subjects.pinned(LOAD_CPU, [program, address, MODEL]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the line that is missing then tells
            self._child.stdin.write(command + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            said = self._child.stderr.read() if self._child.stderr else ""
            raise host.LabError(f"the clients gave up at {command!r}:\n{host.indented(said)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        with contextlib.suppress(BrokenPipeError):
            self._child.communicate()


class Bench:
    """Measures one proxy at a time, each behind a process of its own."""

    def __init__(self, directory: pathlib.Path, arguments: argparse.Namespace) -> None:
        self._directory = directory
        self._arguments = arguments
        self._load = subjects.compiled("load", directory)

    def _with(self, name: str, work: Callable[[Subject, Engine], dict[str, Any]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self._directory) as own:
            directory = pathlib.Path(own)
            with (
                subjects.engine(directory) as engine,
                STARTS[name](directory, engine) as subject,
            ):
                return work(subject, engine)

    def round(self, names: list[str], number: int) -> dict[str, Any]:
        host.say(f"round {number} of {self._arguments.rounds}")
        return {name: self._with(name, self._speed) for name in names}

    def _speed(self, subject: Subject, engine: Engine) -> dict[str, Any]:
        count = self._streams(subject.name)
        # The engine alone is asked for each number of streams that a proxy is asked for.
        counts = sorted({*STREAMS.values(), count} if subject.pid is None else {count})
        return {
            "short": self._short(subject, engine),
            **{
                arrival: {str(n): self._streaming(subject, engine, n, arrival) for n in counts}
                for arrival in ARRIVALS
            },
        }

    def _streams(self, name: str) -> int:
        count: int = STREAMS.get(name, self._arguments.streams)
        return count

    def _streaming(
        self, subject: Subject, engine: Engine, streams: int, arrival: str
    ) -> dict[str, Any]:
        with Load(self._load, subject.address) as load:
            load.ask(f"streams {streams} 1 {arrival}")
            load.ask("measure 1")
            chunks = self._watched(
                subject, engine, lambda: load.ask(f"measure {self._arguments.seconds}")
            )
            first = load.ask(f"first {FIRST_BYTES}") if arrival == "spread" else None
        wanted = streams * 50 * chunks["seconds"]
        return {
            **chunks,
            "cpu_us": chunks["proxy_cpu_seconds"] / chunks["count"] * 1e6,
            "delivered": chunks["count"] / wanted,
            "first_p50_us": first and first["p50_us"],
            "first_p99_us": first and first["p99_us"],
        }

    def _short(self, subject: Subject, engine: Engine) -> dict[str, Any]:
        count = SHORT.get(subject.name, SHORT_REQUESTS)
        with Load(self._load, subject.address) as load:
            load.ask(f"short {CONNECTIONS} {count // 10}")
            done = self._watched(subject, engine, lambda: load.ask(f"short {CONNECTIONS} {count}"))
        cpu = done["proxy_cpu_seconds"]
        return {
            **done,
            "per_second": count / done["seconds"],
            "per_cpu_second": count / cpu if cpu else None,
        }

    @staticmethod
    def _watched(
        subject: Subject, engine: Engine, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """``load_share``: how much of its CPU engine and clients took; near 1 they are the limit
        and not the proxy."""
        proxy, stub = subject.cpu_seconds(), subjects.cpu_seconds(engine.pid)
        answer = work()
        stub = subjects.cpu_seconds(engine.pid) - stub
        proxy = subject.cpu_seconds() - proxy
        return {
            **answer,
            "proxy_cpu_seconds": proxy,
            "proxy_share": proxy / answer["seconds"],
            "load_share": (answer["cpu_seconds"] + stub) / answer["seconds"],
        }

    # ---- memory ---------------------------------------------------------------------------------

    def memory(self, name: str) -> dict[str, Any]:
        host.say(f"memory of {name}")
        return self._with(name, self._per_stream)

    def _per_stream(self, subject: Subject, _engine: Engine) -> dict[str, Any]:
        with Load(self._load, subject.address) as load:
            load.ask(f"short {CONNECTIONS} {CONNECTIONS * 10}")
            at = {0: subject.memory_bytes()}
            for streams in MANY.get(subject.name, MANY_STREAMS):
                load.ask(f"streams {streams} {SLOW}")
                load.ask("measure 3")
                at[streams] = subject.memory_bytes()
        most = max(at)
        return {"bytes_at": at, "streams": most, "bytes_per_stream": (at[most] - at[0]) / most}

    def growth(self) -> dict[str, Any]:
        host.say(f"memory of llmux over {self._arguments.requests} requests")
        return self._with("llmux", self._over_requests)

    def _over_requests(self, subject: Subject, _engine: Engine) -> dict[str, Any]:
        """Memory after each tenth; the first is the warm-up that growth is counted from."""
        tenth = self._arguments.requests // 10
        seen = []
        with Load(self._load, subject.address) as load:
            for _ in range(10):
                load.ask(f"short {CONNECTIONS} {tenth}")
                seen.append(subject.memory_bytes())
        return {"requests": tenth * 10, "bytes_after_tenths": seen, "bytes": seen[-1] - seen[0]}
