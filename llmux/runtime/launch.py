"""From a model's configuration to the command line, environment and unit of its engine."""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress

from llmux.config.schema import ModelConfig, Process, Weights
from llmux.errors import LlmuxError
from llmux.ports import LaunchSpec
from llmux.protocol import Address
from llmux.runtime.drivers import Drivers, Places

log = logging.getLogger("llmux")

# sun_path holds 107 bytes; vLLM's own sockets below the same directory need room for a uuid.
LONGEST_DIRECTORY = 48

# systemd's own variables describe the supervisor's unit, not the engine's.
PRIVATE = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PIDFDID",
    "JOURNAL_STREAM",
    "INVOCATION_ID",
    "SYSTEMD_EXEC_PID",
    "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
    "MAINPID",
    "MANAGERPID",
    "CREDENTIALS_DIRECTORY",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
    "CACHE_DIRECTORY",
    "LOGS_DIRECTORY",
    "CONFIGURATION_DIRECTORY",
    "FDSTORE",
    "USER",
    "LOGNAME",
    "SHELL",
)

ALWAYS = {
    "NO_COLOR": "1",  # escape sequences do not belong into the journal
    "PYTHONUNBUFFERED": "1",  # the last lines before a death must not be lost in a buffer
    "VLLM_NO_USAGE_STATS": "1",  # telemetry keeps a connection open that CRIU cannot dump
    "DO_NOT_TRACK": "1",
}

# For an image that can be restored: facts of vLLM, libuv, NCCL and Python.
CHECKPOINTABLE = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forked children keep /dev/nvidia* descriptors
    "UV_USE_IO_URING": "0",
    "USE_LIBUV": "0",
    "NCCL_IB_DISABLE": "1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "VLLM_HOST_IP": "127.0.0.1",
    # Tracebacks without markers below the lines, and 4 MB less in each of vLLM's processes and in
    # the image: 12 MB of 1.30 GB (vLLM 0.32, Python 3.11, measured 2026-11-21).
    "PYTHONNODEBUGRANGES": "1",
}


def engine_directory(model: str, places: Places) -> str:
    """The model's directory for sockets; a long name is cut and made unique by its hash."""
    if len(model) > LONGEST_DIRECTORY:
        digest = hashlib.sha256(model.encode()).hexdigest()[:12]
        model = f"{model[: LONGEST_DIRECTORY - 13]}-{digest}"
    return f"{places.runtime}/engines/{model}"


def engine_address(config: ModelConfig, places: Places) -> Address:
    if config.port is not None:
        return Address(port=config.port)
    return Address(uds=f"{engine_directory(config.name, places)}/api.sock")


def needs_dev_mode(config: ModelConfig) -> bool:
    """Sleep, wake and the communicators' hooks are vLLM's development endpoints; they are opened
    only when they are used."""
    suspends = config.eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT)
    return sleeps(config) or (suspends and config.tensor_parallel_size > 1)


def sleeps(config: ModelConfig) -> bool:
    return config.eviction.weights is not Weights.RETAIN


def engine_argv(config: ModelConfig, address: Address, command: tuple[str, ...]) -> tuple[str, ...]:
    where = ("--uds", address.uds) if address.uds else ("--host", "127.0.0.1", "--port")
    if address.port is not None:
        where = (*where, str(address.port))
    return (
        *(config.vllm_command or command),
        "serve",
        config.model_path,
        "--served-model-name",
        config.name,  # alone: aliases are the gateway's, so a new one makes no image stale
        *where,
        *(("--enable-sleep-mode",) if sleeps(config) else ()),
        *config.extra_args,
    )


def engine_environment(
    config: ModelConfig, gpus: tuple[int, ...], places: Places
) -> Mapping[str, str]:
    env = {key: value for key, value in places.environment.items() if key not in PRIVATE}
    env.update(ALWAYS)
    if places.engine_user is not None:
        env["HOME"] = _home_of(places.engine_user)
        env["USER"] = env["LOGNAME"] = places.engine_user
    env["VLLM_RPC_BASE_PATH"] = engine_directory(config.name, places)
    if needs_dev_mode(config):
        env["VLLM_SERVER_DEV_MODE"] = "1"
    if config.eviction.process in (Process.CHECKPOINT, Process.CUDA_SUSPEND):
        env.update(CHECKPOINTABLE)
    if gpus:
        visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # the operator's own restriction of the unit is respected: our index counts within it
        chosen = [visible[g] if visible != [""] and g < len(visible) else str(g) for g in gpus]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        # CUDA counts the fastest GPU first by default; NVML, and with it llmux, by PCI address
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    env.update(config.env)
    return env


def _home_of(user: str) -> str:
    try:
        return pwd.getpwnam(user).pw_dir
    except KeyError:
        raise LlmuxError(
            f'cannot start engines: there is no user "{user}" on this machine',
            hint="create it with `systemd-sysusers`, or set engine_user to one that exists",
        ) from None


def remove_stale_socket(address: Address) -> None:
    """A killed engine leaves its socket file behind, and vLLM does not bind an existing one."""
    if address.uds is not None:
        with suppress(FileNotFoundError):
            os.unlink(address.uds)


SLEEP_BROKEN = ((0, 14), (0, 17))  # vllm#32714: from the first to before the second


def warn_about(config: ModelConfig, version: str | None) -> None:
    """Say so when the engine's version is known to do wrong what the model's parking needs. What it
    does is verified anyway: memory that is not freed ends in a stop."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version or "")[:2])
    if sleeps(config) and SLEEP_BROKEN[0] <= numbers < SLEEP_BROKEN[1]:
        log.warning(
            "vLLM %s frees no weights on sleep (vllm#32714): upgrade to 0.17 or later, or park %s"
            " with weights: retain",
            version,
            config.name,
            extra={"model": config.name},
        )


def launch_spec(
    config: ModelConfig, address: Address, gpus: tuple[int, ...], drivers: Drivers
) -> LaunchSpec:
    places = drivers.places
    stdout, stderr = drivers.output.paths(config.name)
    env = engine_environment(config, gpus, places)
    program, *arguments = engine_argv(config, address, places.vllm_command)
    # execve searches no PATH; one that is nowhere keeps its name, for the launcher's message
    found = shutil.which(program, path=env.get("PATH", os.defpath)) or program
    return LaunchSpec(
        model=config.name,
        argv=(found, *arguments),
        env=env,
        user=places.engine_user,
        stdout=stdout,
        stderr=stderr,
        runtime_dir=engine_directory(config.name, places),
    )
