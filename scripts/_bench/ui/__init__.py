"""What 100 open pages cost: CPU and memory of `llmux serve`, and bytes for each page.

Supervisor and gateway are one process here, so that the cost includes the statuses that the
supervisor answers. 50 models, two of which take turns on one GPU, a switch a second. The same is
measured without a page, with a status a second in place of pages, and with all pages. What pages
cost is the difference to the first, in per cent of a core, and it is judged; the difference to the
second leaves out the one status a second that serves all pages. (Embedded, a status looks for the
engines' processes in all of /proc; the service reads a cgroup.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
from typing import Any

from _bench.switch import machine

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/service"))

HELP = "CPU, memory and bytes of 100 open pages with 50 models and a switch a second"
GOAL_PERCENT = 2.0  # of a core
TICKS = os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the three parts")


def run(arguments: argparse.Namespace) -> int:
    from daemon_harness import Daemon  # from tests/service

    directory = pathlib.Path(tempfile.mkdtemp(prefix="lxu"))
    names = [f"model-{at:02}" for at in range(arguments.models)]
    daemon = Daemon(directory, {name: {"canary": False} for name in names}, own_interpreter=True)
    try:
        daemon.start()
        for name in names[:2]:
            daemon.chat(name)
        without = part(daemon, names[:2], arguments.seconds)
        statuses = part(daemon, names[:2], arguments.seconds, status=True)
        with Pages(daemon.http, arguments.pages) as pages:
            pages.begin()
            with_pages = part(daemon, names[:2], arguments.seconds)
            received = pages.received / arguments.pages / with_pages["seconds"] * 60
    finally:
        if daemon.alive:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)
    cost, beside = difference(with_pages, without), difference(with_pages, statuses)
    document = {
        "pages": arguments.pages,
        "models": arguments.models,
        "without_pages": without,
        "with_statuses": statuses,
        "with_pages": with_pages,
        "cost_percent_of_a_core": round(cost, 2),
        "without_statuses_percent_of_a_core": round(beside, 2),
        "bytes_per_page_and_minute": round(received),
        "pages_that_were_cut_off": pages.lost,
        "goal_percent": GOAL_PERCENT,
        "method": " ".join((__doc__ or "").split()),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for name in ("without_pages", "with_statuses", "with_pages"):
        figures = document[name]
        print(f"{name:14} {figures['cpu_percent']:6.2f} % of a core, {figures['memory_mib']} MiB,"
              f" {figures['switches']} switches in {figures['seconds']:.0f} s")  # fmt: skip
    print(f"{arguments.pages} pages cost {cost:.2f} % of a core, and receive {received / 1024:.1f}"
          f" KiB each a minute; {pages.lost} were cut off")  # fmt: skip
    met = cost < GOAL_PERCENT and pages.lost == 0
    verdict = "PASS" if met else "MISS"
    print(f"  {verdict}  less than {GOAL_PERCENT:g} % of a core; {beside:.2f} % without the"
          " statuses that pages ask the supervisor for")  # fmt: skip
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0 if met else 1


def difference(more: dict[str, Any], less: dict[str, Any]) -> float:
    """A busy machine may give fewer switches in one part: both are compared at the same rate."""
    rate = more["switches"] / more["seconds"] / (less["switches"] / less["seconds"])
    return float(more["cpu_percent"] - less["cpu_percent"] * rate)


def part(daemon: Any, names: list[str], seconds: float, *, status: bool = False) -> dict[str, Any]:
    """A switch a second for so long. ``status``: and a status."""
    pid = daemon.process.pid
    before, began = cpu_seconds(pid), time.monotonic()
    switches = 0
    while (passed := time.monotonic() - began) < seconds:
        daemon.chat(names[switches % 2])
        if status:
            daemon.status()
        switches += 1
        time.sleep(max(0.0, switches - (time.monotonic() - began)))
    used = cpu_seconds(pid) - before
    return {
        "seconds": round(passed, 1),
        "switches": switches,
        "cpu_percent": round(used / passed * 100, 2),
        "memory_mib": round(memory_kib(pid) / 1024, 1),
    }


class Pages:
    """Open feeds, read by a thread. ``received`` counts bytes from ``begin`` on."""

    def __init__(self, path: str, count: int) -> None:
        self.received = 0
        self.lost = 0
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._sockets = [self._open(path) for _ in range(count)]
        self._thread = threading.Thread(target=self._read)

    def _open(self, path: str) -> socket.socket:
        page = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        page.connect(path)
        page.sendall(b"GET /ui/feed HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._selector.register(page, selectors.EVENT_READ)
        return page

    def __enter__(self) -> Pages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for page in self._sockets:
            page.close()
        self._selector.close()

    def begin(self) -> None:
        """The first frame, with everything, belongs to the opening of a page."""
        time.sleep(3)
        self.received = 0

    def _read(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.5):
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]  # a socket
                self.received += len(data)
                if not data:
                    self.lost += 1
                    self._selector.unregister(key.fileobj)


def cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_kib(pid: int) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])
