"""A daemon whose engines answer oddly, clients and operators that keep it busy, and its gauges."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemon_harness import Daemon
from fuzz_lines import MODELS, Lines

RESTING = frozenset({"stopped", "parked", "serving", "failed"})
# Below this every deadline of the configuration ends, one after the other, with kill and restart.
LONGEST_STEP_SECS = 90.0
EVICTIONS = (
    "offload+keep_running", "discard+keep_running", "retain+keep_running", "offload+stop",
    "retain+stop",
)  # fmt: skip
STATUSES = frozenset({200, 400, 403, 404, 405, 409, 429, 499, 500, 502, 503, 504})


class Rig:
    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.daemon = daemon
        self.seed = seed
        self.wrong: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.lines = self.connections = 0
        self.slowest = 0.0
        self._lock = threading.Lock()
        self._until = 0.0

    # ---- the share of odd answers ---------------------------------------------------------------

    def odd(self, share: float) -> None:
        (self.daemon.directory / "orders").write_text(str(share))

    def odd_answers(self) -> Counter[str]:
        log = self.daemon.directory / "odd.log"
        return Counter(log.read_text().splitlines() if log.exists() else ())

    # ---- what runs at once ----------------------------------------------------------------------

    def run(self, seconds: float, *, users: int, operators: int, peers: int) -> None:
        """All of them until ``seconds`` have passed."""
        self._until = time.monotonic() + seconds
        work = [(self._user, users), (self._operator, operators), (self._peer, peers)]
        threads = [
            threading.Thread(target=self._bounded, args=(body, f"{self.seed}/{body.__name__}/{n}"))
            for body, count in work
            for n in range(count)
        ]
        threads.append(threading.Thread(target=self._bounded, args=(self._watch, "")))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _bounded(self, body: Any, seed: str) -> None:
        try:
            while time.monotonic() < self._until and len(self.wrong) < 5:
                seed = body(seed)
        except Exception as error:  # noqa: BLE001  # a thread's end is a finding
            self._find(f"{body.__name__}: {type(error).__name__}: {error}")

    def _find(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)

    def _count(self, what: str, answer: Any) -> None:
        with self._lock:
            self.statuses[f"{what} {answer.status}"] += 1
            self.slowest = max(self.slowest, answer.seconds)
        if answer.status not in STATUSES:
            self._find(f"{what}: status {answer.status}: {answer.body[:300]!r}")

    def _user(self, seed: str) -> str:
        chance = random.Random(seed)
        self._count("chat", self.daemon.chat(chance.choice(MODELS)))
        return seed + "."

    def _operator(self, seed: str) -> str:
        chance = random.Random(seed)
        model = chance.choice(MODELS)
        verb = chance.choice(("sleep", "sleep", "wake", "unload", "restart", "switch"))
        more = {"eviction": chance.choice(EVICTIONS)} if verb == "sleep" else {}
        if verb == "unload":
            answer = self.daemon.request("POST", f"/unload?model={model}")
        else:
            answer = self.daemon.ask(verb, model=model, **more)
        self._count(verb, answer)
        return seed + "."

    def _peer(self, seed: str) -> str:
        """One connection to the control socket, left as soon as nothing more is answered."""
        lines = Lines(seed).connection()
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(0.05)
            sock.connect(self.socket)
            for line in lines:
                sock.sendall(line)
            with contextlib.suppress(TimeoutError):
                while sock.recv(1 << 16):
                    pass
        with self._lock:
            self.connections += 1
            self.lines += len(lines)
        return seed + "."

    def _watch(self, seed: str) -> str:
        """The status is answered at all times, and no model stays on the way for long."""
        for name, model in self.daemon.status()["models"].items():
            if model["state"] not in RESTING and model["since_secs"] > LONGEST_STEP_SECS:
                self._find(f"{name} is {model['state']} since {model['since_secs']:.0f} s")
        threading.Event().wait(0.2)  # a look, not a wait for anything
        return seed

    @property
    def socket(self) -> str:
        return str(self.daemon.directory / "control.sock")

    # ---- afterwards -----------------------------------------------------------------------------

    def come_to_rest(self) -> float:
        """Seconds until every model serves a request again and is then stopped."""
        began = time.monotonic()
        self.odd(0)
        self.daemon.ask("unpin")
        self.daemon.ask("mode", mode="auto")
        for name in MODELS:
            self.daemon.ask("eviction", model=name, eviction="retain+stop")
        self._until_at_rest()
        for name in MODELS:
            self._serve_again(name, began + LONGEST_STEP_SECS)
        for name in MODELS:
            self.daemon.park(name, "retain+stop")
        self._until_at_rest()
        return time.monotonic() - began

    def _until_at_rest(self) -> None:
        ends = time.monotonic() + LONGEST_STEP_SECS
        while moving := {n: m for n, m in self.daemon.status()["models"].items()
                         if m["state"] not in RESTING}:  # fmt: skip
            assert time.monotonic() < ends, moving
            self.daemon.chat(next(iter(moving)))  # each question is a whole exchange

    def _serve_again(self, name: str, ends: float) -> None:
        """An engine that answered oddly when it was parked may be found to be unfit only now."""
        while True:
            self.daemon.ask("wake", model=name)
            answer = self.daemon.chat(name)
            if answer.status == 200:
                return
            assert time.monotonic() < ends, (name, answer.body, self.daemon.model(name))

    # ---- gauges ---------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def descriptors(self) -> Counter[str]:
        """How many of each kind."""
        found: Counter[str] = Counter()
        directory = f"/proc/{self.daemon.process.pid}/fd"
        for number in os.listdir(directory):
            with contextlib.suppress(OSError):
                found[os.readlink(f"{directory}/{number}").split(":")[0]] += 1
        return found


@contextlib.contextmanager
def control_rig(seed: int) -> Iterator[Rig]:
    directory = Path(tempfile.mkdtemp(prefix="lxc"))
    environ = {"ODD_ORDERS": str(directory / "orders"), "ODD_LOG": str(directory / "odd.log")}
    engine = [sys.executable, "-S", "-E", str(Path(__file__).with_name("odd_engine.py"))]
    times = {"sleep_timeout_secs": 1, "wake_timeout_secs": 1, "stop_grace_secs": 0.5}
    daemon = Daemon(
        directory,
        {name: {**times, "env": environ} for name in MODELS},
        policy={"request_timeout_secs": 5, "drain_timeout_secs": 1, "backoff_secs": 0.2},
        top={"vllm_command": engine, "startup_timeout_secs": 6},
        answer_secs=LONGEST_STEP_SECS,
        arguments=("--socket", str(directory / "control.sock")),
    )
    try:
        daemon.start()
        yield Rig(daemon, seed)
    except (OSError, AssertionError):
        print(f"seed {seed}; the daemon said last:", *daemon.log.since(0)[-60:], sep="\n")
        raise
    finally:
        if daemon.alive:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)
