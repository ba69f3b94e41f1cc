"""Kill the supervisor at steps of making an image and of restoring from it; prints a JSON report.

    killed_at.py VERB POINT…

VERB is a verb of the control socket, "checkpoint" or "restore". A point is a phase that the
supervisor reports ("sleep", "dump", …), or "criu:before", "criu:inside", "criu:after":
CRIU is held there (criu-that-stops), so that the kill is sure to come at that very moment.

After each kill both models must answer in turns, and nothing may be left of what was begun.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import client
import witness

IMAGES = pathlib.Path("/var/lib/llmux/checkpoints/alpha")
ORDERS = pathlib.Path("/var/tmp/criu")
SOCKET = "/run/llmux/supervisor.sock"


class Asking:
    """One verb, asked on a connection of its own; the supervisor tells where it is."""

    def __init__(self, verb: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(SOCKET)
        ask = {"type": "ask", "id": 1, "verb": verb, "args": {"model": "alpha"}}
        for message in ({"type": "hello", "role": "cli", "version": 1}, ask):
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        self.phases: list[str] = []

    def until(self, phase: str | None) -> bool:
        """True when the phase has begun; False when the verb has ended, or the supervisor."""
        with self._socket, self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if message["type"] == "answer":
                    self.phases.append(f"answer: {message.get('message') or message['ok']}")
                    return False
                self.phases.append(message["phase"])
                if message["phase"] == phase:
                    return True
        return False


def stop() -> None:
    subprocess.run(["llmux", "unload", "alpha"], stdout=subprocess.PIPE, check=True)


def ready(verb: str) -> None:
    """alpha stopped without an image, or parked with one."""
    if verb == "checkpoint":
        shutil.rmtree(IMAGES / "images", ignore_errors=True)
    else:
        subprocess.run(["llmux", "checkpoint", "alpha"], capture_output=True, check=True)


def litter() -> list[str]:
    """Of an image half made, of engines that are gone; all models are stopped."""
    left = [f"{path}" for path in IMAGES.glob(".*")] + [f"{p}" for p in IMAGES.glob("*ing.json*")]
    left += [f"/dev/shm/{name}" for name in sorted(witness.in_shm())]
    return left + (["a stopped criu"] if _criu_lives() else [])


def _criu_lives() -> bool:
    for path in pathlib.Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == "criu":
                return True
        except OSError:
            continue
    return False


def kill_at(verb: str, point: str) -> list[str]:
    ready(verb)
    for name in ("order", "reached"):
        (ORDERS / name).unlink(missing_ok=True)
    supervisor = witness.main_pid(witness.SUPERVISOR)
    if point.startswith("criu:"):
        when = point.removeprefix("criu:")
        step = "dump" if verb == "checkpoint" else "restore"
        (ORDERS / "order").write_text(f"{step} {when} block\n")
        asking = Asking(verb)
        witness.until(f"criu is held {when} its work", (ORDERS / "reached").exists)
        (ORDERS / "order").unlink()
    else:
        asking = Asking(verb)
        if not asking.until(point):
            return [f"{point}: never reached: {asking.phases}"]
    os.kill(supervisor, signal.SIGKILL)
    witness.until(
        "another supervisor answers",
        lambda: witness.main_pid(witness.SUPERVISOR) not in (0, supervisor) and witness.states(),
    )
    return []


async def settle(point: str) -> list[str]:
    wrong = []
    for model in ("beta", "alpha"):
        answer = await client.ask(model, f"after {point}", stream=True, timeout=30)
        if not answer.ok:
            wrong.append(f"{point}: {model}: {answer.error}")
    held = witness.held()
    if held.keys() != {"alpha"} or "kv" not in held["alpha"]:
        wrong.append(f"{point}: GPU memory at the end: {held}")
    wrong += [f"{point}: {stray}" for stray in witness.strays(("alpha", "beta"))]
    return wrong


def main(verb: str, points: list[str]) -> dict[str, object]:
    wrong = []
    for point in points:
        wrong += kill_at(verb, point)
        wrong += asyncio.run(settle(point))
        stop()
        wrong += [f"{point}: left: {name}" for name in litter()]
    return {"wrong": wrong, "kills": len(points)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
