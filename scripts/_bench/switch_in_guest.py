"""The measuring half of `bench switch`, inside the guest, on its Python alone. See switch.py."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from time import monotonic
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/system/load"))

import client  # noqa: E402 (the path first)
import witness  # noqa: E402

MODELS = ("alpha", "beta")
TOKENS = 1
DIRECT = 20  # measurements of the engine alone, of each kind and model


def spread(seconds: list[float]) -> dict[str, float]:
    """Percentiles by the nearest rank, in milliseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {f"p{p}": round(ordered[round(last * p / 100)] * 1000, 2) for p in (50, 90, 99)}


async def timed(model: str, prompt: str) -> float:
    answer = await client.ask(model, prompt, tokens=TOKENS)
    if not answer.ok:
        raise witness.WitnessError(f"{model}: {answer.error}")
    return answer.seconds


def llmux_phases(model: str) -> dict[str, float]:
    """The steps of the model's last operation, as llmux measured them itself."""
    with urllib.request.urlopen("http://127.0.0.1:3000/control/status", timeout=10) as answer:
        phases: dict[str, float] = json.load(answer)["models"][model]["last_phases"]
    return phases


# --- the engine alone -------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("engine", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def call(path: str, method: str, target: str) -> float:
    """One control call on a connection of its own; how long it took."""
    began = monotonic()
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request(method, target)
        answer = connection.getresponse()
        answer.read()
    if answer.status != 200:
        raise witness.WitnessError(f"{method} {target}: {answer.status}")
    return monotonic() - began


def measure_sleep_and_wake(resident: str, parked: str) -> dict[str, list[float]]:
    """Straight at the engines; both are left as they were found, llmux sees nothing of it."""
    found: dict[str, list[float]] = {"sleep": [], "wake": []}
    sockets = {name: f"/run/llmux/engines/{name}/api.sock" for name in MODELS}
    for _ in range(DIRECT):
        for leaving, coming in ((resident, parked), (parked, resident)):
            found["sleep"].append(call(sockets[leaving], "POST", "/sleep?level=1"))
            found["wake"].append(call(sockets[coming], "POST", "/wake_up"))
    return found


@contextlib.contextmanager
def bare_engine(directory: str) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The stand-in without anybody between; (its process, seconds from exec to healthy)."""
    path = f"{directory}/api.sock"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    began = monotonic()
    process = subprocess.Popen(
        [str(ROOT / "tests/standin/standin.py"), "serve", "lab/tiny", "--uds", path],
        env={**os.environ, "STANDIN_LEDGER": f"{directory}/ledger.json"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                call(path, "GET", "/health")
                break
            if process.poll() is not None or monotonic() > began + 30:
                raise witness.WitnessError("the bare engine does not start")
            time.sleep(0.001)  # a tighter loop would take a processor from the engine
        yield process, monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tree(pid: int) -> set[int]:
    found = {pid}
    for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found |= tree(int(child))
    return found


def measure_start_and_stop() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"stop": [], "start": []}
    directory = tempfile.mkdtemp()
    try:
        for _ in range(DIRECT):
            with bare_engine(directory) as (process, seconds):
                found["start"].append(seconds)
                pids = tree(process.pid)
                began = monotonic()
                process.terminate()
                witness.gone(pids, 20.0)
                found["stop"].append(monotonic() - began)
    finally:
        shutil.rmtree(directory)
    return found


# --- all of it --------------------------------------------------------------------------------


async def measure(mode: str, switches: int) -> dict[str, Any]:
    for model in (*MODELS, *MODELS):  # cold starts, and one switch of each kind
        await timed(model, "warm up")
    switch, resident = [], []
    by_phase: dict[str, list[float]] = {}
    for at in range(switches):
        coming, leaving = MODELS[at % 2], MODELS[(at + 1) % 2]
        switch.append(await timed(coming, f"switch {at}"))
        resident.append(await timed(coming, f"again {at}"))
        for model, what in ((leaving, "park"), (coming, "wake")):
            for name, seconds in llmux_phases(model).items():
                by_phase.setdefault(f"{what}/{name}", []).append(seconds)
    if mode == "keep_running":
        engine = measure_sleep_and_wake(coming, leaving)
    elif mode == "freeze":
        # frozen engines do not answer: thawed for the time of the measurement
        freezer = witness.SLICE / f"llmux-{leaving}.scope/engine/cgroup.freeze"
        freezer.write_text("0")
        engine = measure_sleep_and_wake(coming, leaving)
        freezer.write_text("1")
    else:
        engine = measure_start_and_stop()
    alone = sum(sorted(values)[len(values) // 2] for values in engine.values())
    overhead = [a - b - alone for a, b in zip(switch, resident, strict=True)]
    return {
        "count": len(switch),
        "overhead_ms": spread(overhead),
        "switch_ms": spread(switch),
        "resident_ms": spread(resident),
        "engine_ms": {name: spread(values) for name, values in engine.items()},
        "by_phase": {name: spread(values) for name, values in by_phase.items()},
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1], int(sys.argv[2])))))
