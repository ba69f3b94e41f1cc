"""What must be so, whatever was done: looked at from outside, in the guest, as root."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from time import monotonic, sleep
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "load"))

import witness
from ledger import Ledger

RESTING = {"stopped", "parked", "serving", "failed"}
REST_SECS = 90.0


def status() -> dict[str, Any] | None:
    """What llmux says; None while the supervisor is away."""
    done = subprocess.run(
        ["llmux", "status", "--json"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return None
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def ledger_faults() -> list[str]:
    """GPUs that hold more than they have."""
    ledger = Ledger(witness.LEDGER)
    shown = ledger.show()["gpus"]
    return [
        f"GPU {gpu} holds {one['used']} of {one['capacity']} bytes"
        for gpu, one in shown.items()
        if one["used"] > one["capacity"]
    ]


def at_rest(models: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Wait until nothing is under way; (status, what still was when the wait ended)."""
    deadline = monotonic() + REST_SECS
    while True:
        said = status()
        if said is not None and set(said["models"]) == set(models):
            busy = [
                f"{name} is {one['state']} with {one['in_flight']} in flight and"
                f" {one['queue_depth']} waiting"
                for name, one in said["models"].items()
                if one["state"] not in RESTING or one["in_flight"] or one["queue_depth"]
            ]
            if not busy:
                return said, []
        else:
            busy = [f"status says {'nothing' if said is None else sorted(said['models'])}"]
        if monotonic() > deadline:
            return said or {"models": {}}, busy
        sleep(0.1)


def lies(said: dict[str, Any]) -> list[str]:
    """Where llmux's word and the system differ; only when nothing is under way."""
    scopes, wrong = witness.scopes(), []
    for name, one in said["models"].items():
        state, parked_as, pids = one["state"], one["parked_as"] or "", scopes.get(name, set())
        has_processes = state == "serving" or (
            state == "parked" and not parked_as.endswith("+checkpoint")
        )
        if has_processes and not pids:
            wrong.append(f"{name} is {state} ({parked_as}) and has no process")
        if not has_processes and pids:
            wrong.append(f"{name} is {state} ({parked_as}) and has processes {sorted(pids)}")
        if has_processes and pids:
            if one["pid"] not in pids:
                wrong.append(f"{name}: process {one['pid']} is not in its scope")
            stopped = parked_as.endswith(("+freeze", "+cuda_suspend"))
            if witness.frozen(name) != stopped:
                wrong.append(f"{name} is {state} ({parked_as}), frozen: {witness.frozen(name)}")
        if state != "serving" and "weights" in witness.held().get(name, {}):
            wrong.append(f"{name} is {state} ({parked_as}) and holds its weights on a GPU")
    return wrong


def footprint(unit: str) -> dict[str, int]:
    """Resident memory in KiB and open descriptors of the unit's processes, summed."""
    found = {"rss_kib": 0, "descriptors": 0}
    for pid in witness.processes(witness.SLICE / unit):
        try:
            pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors = len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir()))
        except OSError:
            continue  # it ended meanwhile
        found["rss_kib"] += pages * 4
        found["descriptors"] += descriptors
    return found
