"""The doctor on what parking needs: NVIDIA driver, libcuda, CRIU and the engines themselves."""

from __future__ import annotations

import json
import re
import sys
from typing import Final

from llmux.config.schema import Config, ModelConfig
from llmux.drivers.cuda.driver import HELPER, LIBRARY, OLDEST_DRIVER, greeting_problem
from llmux.drivers.doctor.facts import Check, Host, Level, Needs, bad, dotted, version
from llmux.engines import ENGINE_TYPES
from llmux.engines.engine_type import EngineType

CRIU_OLDEST = (4, 1)  # vvar_vclock: older ones fail on kernel >= 6.13 (criu 8ee2eba47)
CRIU_ADVISED = (4, 2)  # guard pages of glibc >= 2.42, frozen single processes (fddca67cc)
# What the distributions have, 2026-11.
CRIU_SOURCES = (
    "Debian 13: 4.1.1, for kernels before 6.16; Debian 12, Ubuntu 24.04: none; else criu.org"
)
VDSO_KERNEL = (6, 13)
# SO_PASSSEC (measured: 4.1.1 fails on kernel 6.18, 4.2.1 works; on 6.12 both do). 4.2's change log
# names 6.16 as the kernel that needed it.
PASSSEC_KERNEL = (6, 16)
# Driver versions in which CUDA parking is known to go wrong, the GPU it needs, what happens.
DRIVER_FAULTS = (
    ("575.", "H200", "refuses CUDA checkpoints on an H200 (cuda-checkpoint#37)"),
    ("595.71.05", "", "may hang the host when a resumed engine is killed (cuda-checkpoint#53)"),
    ("610.57.04", "", "may kill an engine that is suspended (cuda-checkpoint#58)"),
)
ASK_VERSION = "import importlib.metadata as m; print(m.version({!r}))"


def check_driver(host: Host, config: Config | None) -> Check:
    needed = Needs.of(config).cuda
    text = host.read("/proc/driver/nvidia/version")
    remedy = f"install an NVIDIA driver >= {OLDEST_DRIVER} (580 or later where it can be had)"
    if text is None:
        return Check("NVIDIA driver", bad(needed), "not loaded: no /proc/driver/nvidia", remedy)
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..." or, of the open module,
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  ..."
    found = re.search(r"\b(\d{3,4}(?:\.\d+){1,2})\b", text)
    if found is None:
        return Check("NVIDIA driver", Level.WARN, f"unreadable version: {text[:80]!r}", remedy)
    if version(found[1])[0] < int(OLDEST_DRIVER):
        seen = f"{found[1]}: no CUDA checkpoint of processes that use NVML, and PyTorch does"
        return Check("NVIDIA driver", bad(needed), seen, remedy)
    for prefix, gpu, fault in DRIVER_FAULTS:
        if found[1].startswith(prefix) and (not gpu or gpu in _gpu_names(host)):
            other = "install another driver (580 or later), or park without CUDA suspend"
            level = Level.WARN if needed else Level.OK
            return Check("NVIDIA driver", level, f"{found[1]}: {fault}", other)
    return Check("NVIDIA driver", Level.OK, found[1])


def _gpu_names(host: Host) -> str:
    ran = host.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], 30.0)
    return ran.output if ran.status == 0 else ""


def check_libcuda(host: Host, config: Config | None) -> Check:
    """By the helper itself: the same interpreter, the same calls."""
    tool = config.checkpoint.cuda_checkpoint_path if config else None
    needed = Needs.of(config).cuda and tool is None
    ran = host.run([sys.executable, "-I", str(HELPER), "--library", LIBRARY], 60.0)
    try:
        greeting = json.loads(ran.output.splitlines()[0])
    except (ValueError, IndexError):
        seen = f"the CUDA helper failed: {ran.output[:200].strip() or 'no answer within 60 s'}"
        remedy = f"`{sys.executable} -I {HELPER} --library {LIBRARY}` shows why"
        return Check("libcuda", bad(needed), seen, remedy)
    problem = greeting_problem(greeting, LIBRARY)
    if problem is not None:
        return Check("libcuda", bad(needed), *problem)
    api = int(greeting["driver_version"])
    seen = f"{LIBRARY}, CUDA {api // 1000}.{api % 1000 // 10}, all checkpoint functions"
    return Check("libcuda", Level.OK, seen)


def check_gpus(host: Host, config: Config | None) -> Check:
    needed = Needs.of(config).cuda
    asked = "name,memory.total,persistence_mode,mig.mode.current"
    query = [f"--query-gpu={asked}", "--format=csv,noheader"]
    ran = host.run(["nvidia-smi", *query], 30.0)
    rows = [line.strip() for line in ran.output.splitlines() if line.strip()]
    if ran.status != 0 or not rows:
        seen = rows[0] if rows else "nvidia-smi found none"
        remedy = "look at `nvidia-smi` and `journalctl -k` for NVRM"
        if host.which("nvidia-smi") is None:
            remedy = "install nvidia-smi, of the driver's version (Ubuntu: nvidia-utils-NNN)"
        return Check("GPUs", bad(needed), seen, remedy)
    if any(row.endswith("Enabled") for row in rows):
        remedy = "switch MIG off for CUDA parking (`nvidia-smi -mig 0`), or park with stop"
        return Check("GPUs", bad(needed), f"MIG is on: {'; '.join(rows)}", remedy)
    if any(row.split(", ")[2:3] == ["Disabled"] for row in rows):
        seen = f"persistence mode is off: {'; '.join(rows)}"
        remedy = "enable nvidia-persistenced: else the first start or resume initialises each GPU"
        return Check("GPUs", Level.WARN, seen, remedy)
    return Check("GPUs", Level.OK, "; ".join(rows))


def check_cuda_checkpoint(host: Host, config: Config | None) -> Check:
    path = config.checkpoint.cuda_checkpoint_path if config else None
    if path is None:
        return Check("cuda-checkpoint", Level.OK, "not configured: the driver API is used")
    found = host.which(path)
    if found is None:
        remedy = "correct checkpoint.cuda_checkpoint_path, or leave it out to use the driver API"
        return Check("cuda-checkpoint", Level.FAIL, f"{path}: not there or not executable", remedy)
    ran = host.run([found, "--help"], 30.0)
    if "--action" not in ran.output:
        remedy = f"needs NVIDIA driver >= {OLDEST_DRIVER} and a current cuda-checkpoint"
        return Check("cuda-checkpoint", Level.FAIL, f"{found} has no --action", remedy)
    return Check("cuda-checkpoint", Level.OK, found)


def check_criu(host: Host, config: Config | None) -> Check:
    needed = Needs.of(config).criu
    path = config.checkpoint.criu_path if config else "criu"
    ran = host.run([path, "--version"], 10.0)
    oldest, advised = dotted(CRIU_OLDEST), dotted(CRIU_ADVISED)
    remedy = f"install criu >= {advised} ({CRIU_SOURCES}), or park without checkpoint"
    if ran.status != 0:
        return Check("CRIU", bad(needed), ran.output.strip()[:200], remedy)
    numbers = version(ran.output)
    seen = f"{dotted(numbers)} on kernel {host.release}"
    if numbers < CRIU_OLDEST:
        why = "fails on this kernel" if host.kernel >= VDSO_KERNEL else f"older than {oldest}"
        return Check("CRIU", bad(needed), f"{seen}: {why}", remedy)
    if numbers < CRIU_ADVISED and host.kernel >= PASSSEC_KERNEL:
        return Check("CRIU", bad(needed), f"{seen}: fails on kernels this new", remedy)
    return Check("CRIU", Level.OK, seen)


def check_criu_works(host: Host, config: Config | None) -> Check:
    needed = Needs.of(config).criu
    path = config.checkpoint.criu_path if config else "criu"
    if host.which(path) is None:
        return Check("criu check", bad(needed), "no criu", "install criu")
    if host.euid != 0:
        return Check("criu check", Level.WARN, "not tried: needs root", "run doctor as root")
    if (host.read("/proc/sys/kernel/yama/ptrace_scope") or "").strip() == "3":
        remedy = "set kernel.yama.ptrace_scope to 2 or less and reboot (3 cannot be undone)"
        return Check("criu check", bad(needed), "kernel.yama.ptrace_scope is 3", remedy)
    ran = host.run([path, "check", "--no-default-config"], 30.0)
    lines = [line.strip() for line in ran.output.splitlines() if line.strip()]
    if ran.status == 0:
        return Check("criu check", Level.OK, lines[-1] if lines else "good")
    errors = [line for line in lines if "Error" in line] or lines or [f"status {ran.status}"]
    remedy = "see what the kernel lacks with `criu check -v4`"
    return Check("criu check", bad(needed), errors[-1][:200], remedy)


CAPABILITIES: Final = "capabilities"
# linux/capability.h; what a root of the host has and one in a container often lacks.
CRIU_NEEDS: Final = {"SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_RESOURCE": 24}


def check_capabilities(host: Host, config: Config | None) -> Check:
    """A container's root lacks some; CRIU then dumps root's processes at most."""
    if host.euid != 0:
        return Check(CAPABILITIES, Level.WARN, "not known: needs root", "run doctor as root")
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)$", host.read("/proc/self/status") or "", re.M)
    has = int(found[1], 16) if found else ~0
    missing = [name for name, bit in CRIU_NEEDS.items() if not has >> bit & 1]
    if not missing:
        return Check(CAPABILITIES, Level.OK, ", ".join(CRIU_NEEDS))
    user = config.engine_user if config is not None else None
    needed = Needs.of(config).criu and (user != "root" or missing != ["SYS_RESOURCE"])
    seen = f"no {', no '.join(missing)}: CRIU cannot dump other users' engines"
    remedy = "run llmux on the host itself, or give the container all capabilities"
    return Check(CAPABILITIES, bad(needed), seen, remedy)


def check_network_lock(host: Host, config: Config | None) -> Check:
    tools = [tool for tool in ("nft", "iptables") if host.which(tool)]
    if tools:
        return Check("network lock", Level.OK, ", ".join(tools))
    remedy = "install nftables or iptables: CRIU holds TCP connections still with it"
    return Check("network lock", bad(Needs.of(config).criu), "neither nft nor iptables", remedy)


def interpreter_of(host: Host, command: str) -> str | None:
    """The Python that a console script runs under: its first line. Asking the engine for its
    version imports it, which takes many seconds; its metadata takes none."""
    found = host.which(command)
    if found is None:
        return None
    try:
        with open(found, "rb") as file:
            first = file.readline(512).decode(errors="replace").strip()
    except OSError:
        return None
    return first[2:].strip() if first.startswith("#!") and "python" in first else None


def check_engines(host: Host, config: Config | None) -> list[Check]:
    """One check for each command that starts a model."""
    config_or_default = config or Config()
    default = ModelConfig("", "")
    models = (*config_or_default.models.values(),) or (default,)
    started = {
        (model.vllm_command or config_or_default.vllm_command, model.engine) for model in models
    }
    return [
        _check_engine(host, config, command, ENGINE_TYPES[engine])
        for command, engine in sorted(started)
    ]


def _check_engine(
    host: Host, config: Config | None, command: tuple[str, ...], engine: EngineType
) -> Check:
    called = " ".join(command)

    def check(level: Level, seen: str, remedy: str = "") -> Check:
        return Check(engine.title, level, f"{called}: {seen}", remedy)

    if host.which(command[0]) is None:
        remedy = "correct vllm_command: an absolute path, e.g. /opt/vllm/bin/vllm"
        return check(bad(config is not None), "not there or not executable", remedy)
    interpreter = interpreter_of(host, command[0])
    if interpreter is None:
        return check(Level.OK, "there; not a Python script, so its version is not known")
    ran = host.run([*interpreter.split(), "-c", ASK_VERSION.format(engine.distribution)], 30.0)
    if ran.status != 0 or not version(ran.output):
        seen = f"no {engine.distribution} in {interpreter}"
        return check(Level.WARN, seen, "is it the right environment?")
    seen = ran.output.strip()
    fault = engine.version_fault(seen, Needs.of(config).sleep)
    if fault is not None:
        level = Level.FAIL if fault.serious else Level.WARN
        return check(level, f"{seen}: {fault.problem}", fault.remedy)
    return check(Level.OK, seen)
