"""Look at the GPUs' ledger at each of its changes, until the standard input ends; then print what
was seen as JSON. In the guest.

    watch_ledger.py

``looks``: how often; ``over``: GPUs that held more than they have; ``gpus``: model → sets of GPUs
on which it held weights, each with the seconds that it did; ``complaints``: of engines, about the
memory of the whole device (tests/standin, device-checks).
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import select
import sys
from time import monotonic
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "standin"))

from ledger import Ledger

LEDGER = pathlib.Path("/var/tmp/gpu/ledger.json")
IN_MOVED_TO = 0x80  # linux/inotify.h: every change of the ledger is a rename
LOOK_SECS = 0.05  # at least so often: a process that ends changes no file


class Watch:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.ledger = Ledger(str(path))
        self.looks = 0
        self.over: dict[str, int] = {}
        self.held: dict[str, dict[str, float]] = {}
        self._last: dict[str, str] = {}
        self._since = monotonic()

    def look(self) -> None:
        now = monotonic()
        for model, gpus in self._last.items():
            seconds = self.held.setdefault(model, {})
            seconds[gpus] = seconds.get(gpus, 0.0) + now - self._since
        self._since = now
        self.looks += 1
        rows = self.ledger.rows()
        for gpu in {row.gpu for row in rows}:
            used = sum(row.nbytes for row in rows if row.gpu == gpu)
            if used > (size := self.ledger.capacity(gpu)):
                self.over[f"GPU {gpu} holds {used} of {size} bytes"] = self.looks
        on: dict[str, set[int]] = {}
        for row in rows:
            if row.kind == "weights" and row.nbytes:
                on.setdefault(row.model, set()).add(row.gpu)
        self._last = {model: ",".join(map(str, sorted(gpus))) for model, gpus in on.items()}

    def report(self) -> dict[str, Any]:
        complaints = pathlib.Path(f"{self.path}.complaints")
        said = complaints.read_text().splitlines() if complaints.exists() else []
        return {
            "looks": self.looks,
            "over": sorted(self.over),
            "gpus": self.held,
            "complaints": said,
        }


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    changes = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if changes < 0 or libc.inotify_add_watch(changes, os.fsencode(LEDGER.parent), IN_MOVED_TO) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    watch = Watch(LEDGER)
    while True:
        watch.look()
        ready, _, _ = select.select([changes, sys.stdin], [], [], LOOK_SECS)
        if changes in ready:
            os.read(changes, 65536)
        if sys.stdin in ready:
            watch.look()
            print(json.dumps(watch.report()))
            return


if __name__ == "__main__":
    main()
