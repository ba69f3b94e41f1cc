"""The doctor on the GPUs themselves: does NVML answer, and which memory is not llmux's?"""

from __future__ import annotations

import json
import os
import sys
from typing import Final

from llmux.config.schema import Config
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, Needs, bad
from llmux.drivers.gpu import LEDGER_VARIABLE, LIBRARY_VARIABLE

# In a process of its own, since a call into a GPU driver that hangs does not return.
LOOK = """
import asyncio, json, os, sys
sys.path[:0] = {path!r}
os.environ.update({variables!r})
from llmux.drivers.gpu import find_gpu_observer
async def look():
    gpu = find_gpu_observer()
    rows = [[p.gpu, p.pid, p.used_bytes] for p in await gpu.processes()]
    print(json.dumps([dict(await gpu.totals()), dict(await gpu.used()), rows, gpu.available]))
asyncio.run(look())
"""
LOOK_SECS = 20.0  # without persistence mode the first look initialises every GPU
SHOWN = 3  # processes of others
IN_USE = GIB // 2  # a display server and its like are no reason to warn


def check_memory(host: Host, config: Config | None) -> Check:
    """Of each GPU: what is in use, and by processes that are no engines of llmux's."""
    needed = Needs.of(config).cuda
    variables = {n: os.environ[n] for n in (LEDGER_VARIABLE, LIBRARY_VARIABLE) if n in os.environ}
    script = LOOK.format(path=sys.path, variables=variables)
    ran = host.run([sys.executable, "-I", "-c", script], LOOK_SECS)
    try:
        totals, used, rows, available = json.loads(ran.output.splitlines()[0])
    except (ValueError, IndexError):
        seen = f"NVML does not answer: {_last_line(ran.output)}"
        remedy = "does `nvidia-smi` answer? a GPU that fell off the bus needs a reboot"
        return Check("GPU memory", bad(needed), seen, remedy)
    if not available:
        return Check("GPU memory", Level.OK, "no NVML here: releases are taken on trust")
    seen = ", ".join(
        f"GPU {gpu}: {used[gpu] / GIB:.1f} of {totals[gpu] / GIB:.1f} GiB in use" for gpu in totals
    )
    others = [(gpu, pid, size) for gpu, pid, size in rows if not _is_engine(host, pid)]
    if sum(size for _, _, size in others) > IN_USE:
        named = ", ".join(
            f"process {pid} ({_name(host, pid)}) holds {size / GIB:.1f} GiB of GPU {gpu}"
            for gpu, pid, size in sorted(others, key=lambda row: -row[2])[:SHOWN]
        )
        remedy = "end it, or claim less: lower `gpu_memory` of the models on that GPU"
        return Check("GPU memory", Level.WARN, f"{seen}; {named}", remedy)
    return Check("GPU memory", Level.OK, seen)


SERVICES: Final = "GPU services"
_MPS: Final = "nvidia-cuda-mps"  # as far as a process's name goes: -control, -server
_SWITCHES: Final = "/proc/driver/nvidia-nvswitch/devices"


def check_services(host: Host, config: Config | None) -> list[Check]:
    """What runs beside the driver: MPS, which parking cannot have, and what NVSwitches need.
    Nothing where there is no driver."""
    if host.read("/proc/driver/nvidia/version") is None:
        return []
    for entry in sorted(host.path("/proc").iterdir()):
        if entry.name.isdigit() and (host.read(f"/proc/{entry.name}/comm") or "").startswith(_MPS):
            remedy = "`echo quit | nvidia-cuda-mps-control`, or park with stop"
            seen = f"MPS runs (process {entry.name}): CUDA state of its clients cannot be suspended"
            return [Check(SERVICES, bad(Needs.of(config).cuda), seen, remedy)]
    switches = host.path(_SWITCHES)
    if switches.is_dir() and any(switches.iterdir()):
        ran = host.run(["systemctl", "is-active", "nvidia-fabricmanager"], 10.0)
        if ran.output.strip() != "active":
            seen = f"there are NVSwitches, and nvidia-fabricmanager is {ran.output.strip()[:80]}"
            remedy = (
                "`systemctl enable --now nvidia-fabricmanager`, of the driver's version: until then"
                ' CUDA answers "system not yet initialized"'
            )
            return [Check(SERVICES, Level.FAIL, seen, remedy)]
        return [Check(SERVICES, Level.OK, "no MPS, nvidia-fabricmanager is active")]
    return [Check(SERVICES, Level.OK, "no MPS, no NVSwitches")]


def _is_engine(host: Host, pid: int) -> bool:
    return "/llmux.slice/llmux-" in (host.read(f"/proc/{pid}/cgroup") or "")


def _name(host: Host, pid: int) -> str:
    return (host.read(f"/proc/{pid}/comm") or "gone").strip()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"not within {LOOK_SECS:g} s"
