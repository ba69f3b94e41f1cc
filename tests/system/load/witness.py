"""What the system itself says: units, cgroups, processes, GPU ledger. In the guest, as root."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TypeVar

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "standin"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from ledger import Ledger

SLICE = pathlib.Path("/sys/fs/cgroup/llmux.slice")
LEDGER = "/var/tmp/gpu/ledger.json"
IMAGES = "/var/lib/llmux/checkpoints"
SHM = "/dev/shm"
SUPERVISOR, GATEWAY = "llmux.service", "llmux-gateway.service"

Value = TypeVar("Value")


class WitnessError(Exception):
    """The system is not as it must be; the message says how it is."""


def show(unit: str, name: str) -> str:
    done = subprocess.run(
        ["systemctl", "show", "--value", f"--property={name}", unit],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def main_pid(unit: str) -> int:
    """Of a unit that is there; 0 when it has none."""
    return int(show(unit, "MainPID"))


def in_shm() -> set[str]:
    """Names there, but for those that llmux holds for an image that exists."""
    from llmux.drivers.criu.held_names import HeldNames, needed_names
    from llmux.drivers.images.store import ImageStore

    store = ImageStore(IMAGES)
    names = HeldNames(store, SHM)
    held = {
        name
        for image, manifest in store.with_manifests()
        for name in needed_names(manifest.shm, image.path, SHM)
        if names.is_ours(name)
    }
    return set(os.listdir(SHM)) - held


def processes(cgroup: pathlib.Path) -> dict[int, str]:
    """pid → name, of the cgroup and everything below it."""
    found = {}
    for path in [cgroup, *cgroup.rglob("*")] if cgroup.is_dir() else []:
        try:
            pids = (path / "cgroup.procs").read_text().split()
        except OSError:
            continue  # a file, or a cgroup that went meanwhile
        for pid in pids:
            try:
                found[int(pid)] = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
    return found


ENGINE_UIDS = range(60706, 61184)  # one for each model


def scopes() -> dict[str, set[int]]:
    """model → pids in its scope."""
    found = {}
    for path in SLICE.glob("llmux-*.scope"):
        name = path.name.removeprefix("llmux-").removesuffix(".scope")
        found[name] = set(processes(path))
    return found


def engine_runs(model: str) -> bool:
    """Its launcher has been let through the gate and has become the engine."""
    for pid in scopes().get(model, ()):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if b"standin.py\0serve" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


def strays(models: Iterable[str]) -> list[str]:
    """Processes and scopes that are where no process or scope should be."""
    wrong = [f"scope of no model: {name}" for name in set(scopes()) - set(models)]
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            uid = path.stat().st_uid
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            cgroup = (path / "cgroup").read_text().strip().removeprefix("0::")
        except OSError:
            continue
        # the kernel gives the path as this guest sees it
        unit = cgroup.partition("llmux.slice/")[2].partition("/")[0]
        is_engine = uid in ENGINE_UIDS or "standin.py serve" in command or "VLLM::" in command
        if is_engine and not unit.endswith(".scope"):
            wrong.append(f"engine process {path.name} outside of a scope: {command} in {cgroup}")
        verbs = ("/usr/bin/llmux supervise ", "/usr/bin/llmux gateway ")  # others are orders
        is_daemon = command.startswith("/usr/bin/python3") and any(v in command for v in verbs)
        if is_daemon and unit not in (SUPERVISOR, GATEWAY):
            wrong.append(f"daemon process {path.name} outside of the services: {command}")
    return wrong


def living(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if os.path.exists(f"/proc/{pid}")}


def gone(pids: Iterable[int], seconds: float) -> None:
    """Wait until the processes have ended; a pidfd is readable then."""
    deadline = monotonic() + seconds
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([fd], [], [], max(0.0, deadline - monotonic()))[0]:
                raise WitnessError(f"process {pid} has not ended within {seconds:g} s")
        finally:
            os.close(fd)


def until(what: str, look: Callable[[], Value], seconds: float = 20.0) -> Value:
    """The first true value of ``look``."""
    deadline = monotonic() + seconds
    while not (value := look()):
        if monotonic() > deadline:
            raise WitnessError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)  # what is looked at needs the processor too
    return value


def states() -> dict[str, str]:
    """model → state, as /control/status says; nothing while the supervisor is away."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:3000/control/status", timeout=10) as answer:
            document = json.load(answer)
    except OSError:
        return {}
    return {name: model["state"] for name, model in document["models"].items()}


def frozen(model: str) -> bool:
    events = SLICE / f"llmux-{model}.scope" / "engine" / "cgroup.events"
    return "frozen 1" in events.read_text()


def held() -> dict[str, dict[str, int]]:
    """model → kind (context, weights, kv) → bytes of GPU memory now, kinds of zero left out."""
    found: dict[str, dict[str, int]] = {}
    for row in Ledger(LEDGER).rows():
        if row.nbytes:
            kinds = found.setdefault(row.model, {})
            kinds[row.kind] = kinds.get(row.kind, 0) + row.nbytes
    return found
