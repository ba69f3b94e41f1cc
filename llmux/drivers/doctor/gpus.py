"""The doctor on the GPUs themselves: does NVML answer, and which memory is not llmux's?"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from llmux.config.schema import ENGINES, Config
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, Needs, bad
from llmux.drivers.gpu import CALL_SECS, LEDGER_VARIABLE, LIBRARY_VARIABLE

# In a process of its own, since a call into a GPU driver that hangs does not return.
LOOK = """
import asyncio, json, os, sys, time
sys.path[:0] = {path!r}
os.environ.update({variables!r})
from llmux.drivers.gpu import find_gpu_observer
async def look():
    gpu = find_gpu_observer()
    totals, used = dict(await gpu.totals()), dict(await gpu.used())
    began = time.monotonic()
    rows = [[p.gpu, p.pid, p.used_bytes] for p in await gpu.processes()]
    took = time.monotonic() - began
    print(json.dumps([totals, used, rows, gpu.available, took]))
asyncio.run(look())
"""
LOOK_SECS = 20.0  # without persistence mode the first look initialises every GPU
SLOW_SECS = 2.0  # it answers in milliseconds, once it has started
SHOWN = 3  # processes of others
IN_USE = GIB // 2  # a display server and its like are no reason to warn


@dataclass(frozen=True, slots=True)
class Look:
    """What NVML says: of each GPU its memory and what of it is used, and (GPU, process, bytes).
    ``problem``: why it says nothing."""

    totals: Mapping[int, int] = field(default_factory=dict)
    used: Mapping[int, int] = field(default_factory=dict)
    rows: Sequence[tuple[int, int, int]] = ()
    available: bool = False
    problem: str = ""
    seconds: float = 0.0


def look_at(host: Host) -> Look:
    """Once for all checks."""
    if "nvml" not in host.found:
        host.found["nvml"] = _look(host)
    look: Look = host.found["nvml"]
    return look


def _look(host: Host) -> Look:
    variables = {n: os.environ[n] for n in (LEDGER_VARIABLE, LIBRARY_VARIABLE) if n in os.environ}
    script = LOOK.format(path=sys.path, variables=variables)
    ran = host.run([sys.executable, "-I", "-c", script], LOOK_SECS)
    try:
        totals, used, rows, available, seconds = json.loads(ran.output.splitlines()[0])
    except (ValueError, IndexError, TypeError):
        return Look(problem=_last_line(ran.output))
    return Look(
        {int(gpu): size for gpu, size in totals.items()},
        {int(gpu): size for gpu, size in used.items()},
        [tuple(row) for row in rows],
        available,
        seconds=seconds,
    )


def check_memory(host: Host, config: Config | None) -> Check:
    """Of each GPU: what is in use, and by processes that are no engines of llmux's."""
    look = look_at(host)
    if look.problem:
        seen = f"NVML does not answer: {look.problem}"
        remedy = "does `nvidia-smi` answer? a GPU that fell off the bus needs a reboot"
        return Check("GPU memory", bad(Needs.of(config).cuda), seen, remedy)
    if not look.available:
        seen = "no NVML here: that GPU memory was released is taken on trust"
        if host.read("/proc/driver/nvidia/version") is None:
            return Check("GPU memory", Level.OK, seen)
        remedy = "install libnvidia-ml.so.1, of the driver's version (Debian: libnvidia-ml1)"
        return Check("GPU memory", Level.WARN, seen, remedy)
    totals, used = look.totals, look.used
    seen = ", ".join(
        f"GPU {gpu}: {used[gpu] / GIB:.1f} of {totals[gpu] / GIB:.1f} GiB in use" for gpu in totals
    )
    others = [(gpu, pid, size) for gpu, pid, size in look.rows if not _is_engine(host, pid)]
    short = list(_short(config, totals, others))
    if short or sum(size for _, _, size in others) > IN_USE:
        named = "; ".join(
            [
                *(
                    f"process {pid} ({_name(host, pid)}) holds {size / GIB:.1f} GiB of GPU {gpu}"
                    for gpu, pid, size in sorted(others, key=lambda row: -row[2])[:SHOWN]
                ),
                *short[:SHOWN],
            ]
        )
        remedy = "end it, or claim less: lower `gpu_memory` of the models on that GPU"
        return Check("GPU memory", Level.WARN, f"{seen}; {named}", remedy)
    if look.seconds > SLOW_SECS:
        seen = f"{seen}; NVML took {look.seconds:.1f} s to list processes"
        remedy = (
            f"llmux waits {CALL_SECS:g} s for that, before and after each move of a model: see"
            " `journalctl -k` for NVRM"
        )
        return Check("GPU memory", Level.WARN, seen, remedy)
    return Check("GPU memory", Level.OK, seen)


def _short(
    config: Config | None, totals: Mapping[int, int], others: Sequence[tuple[int, int, int]]
) -> Iterator[str]:
    """Models whose claim is more than what others leave of a GPU that is named for them."""
    taken = {gpu: sum(size for of, _, size in others if of == gpu) for gpu in totals}
    for model in config.models.values() if config is not None else ():
        for gpu in model.gpus if isinstance(model.gpus, tuple) else ():
            claim = int(model.gpu_memory * totals.get(gpu, 0))
            if taken.get(gpu) and claim > (left := totals[gpu] - taken[gpu]):
                yield (
                    f"{model.name} claims {claim / GIB:.1f} GiB of GPU {gpu}, and others leave"
                    f" {left / GIB:.1f}"
                )


DEVICES: Final = "GPU devices"
UVM: Final = ("/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
UVM_REMEDY: Final = (
    "`nvidia-modprobe -u -c=0` as root (llmux.service does so itself before its first engine, by"
    " starting CUDA); nvidia-persistenced keeps the driver loaded"
)


def check_devices(host: Host, config: Config | None) -> list[Check]:
    """The nodes that an engine opens, there and open to its user. Nothing without a driver."""
    if host.read("/proc/driver/nvidia/version") is None:
        return []
    numbered = sorted(
        f"/dev/{entry.name}"
        for entry in host.path("/dev").glob("nvidia*")
        if re.fullmatch(r"nvidia\d+", entry.name)
    )
    names = ["/dev/nvidiactl", *numbered, *UVM]
    missing = [name for name in names if not host.path(name).exists()]
    if not numbered:
        missing.insert(0, "/dev/nvidia0")
    user = (config.engine_user if config is not None else None) or ENGINES
    closed = [name for name in names if name not in missing and not _opens(host, name, user)]
    if closed:
        owner = host.path(closed[0]).stat()
        seen = f"{user} may not open {', '.join(closed)} ({_mode(owner)})"
        remedy = (
            f"add {user} to the group that owns them (`usermod -aG GROUP {user}`), or leave the"
            " driver its default mode, 0666 (NVreg_DeviceFileMode)"
        )
        return [Check(DEVICES, Level.FAIL, seen, remedy)]
    if missing:
        remedy = UVM_REMEDY if missing[0] in UVM else "`nvidia-modprobe -c=0`, then `nvidia-smi`"
        return [Check(DEVICES, Level.WARN, f"there is no {', no '.join(missing)}", remedy)]
    return [Check(DEVICES, Level.OK, f"{len(numbered)} of GPUs, uvm and ctl, open to {user}")]


def _opens(host: Host, name: str, user: str) -> bool:
    """By the mode: engines have no capability to go past it."""
    if user == "root":
        return True
    status = host.path(name).stat()
    both = 0o6
    if status.st_mode & both == both:
        return True
    try:
        groups = host.groups_of(user)
    except KeyError:
        return True  # there is no such user: said where users are looked at
    return status.st_gid in groups and (status.st_mode >> 3) & both == both


def _mode(status: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(status.st_mode):04o}, group {status.st_gid}"


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
