"""From a model's configuration to the command line, environment and unit of its engine."""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import re
import shutil
from collections.abc import Mapping
from types import MappingProxyType

from llmux.config.schema import ModelConfig, Weights
from llmux.engines.engine_type import Launch
from llmux.errors import EngineUnhealthy, LlmuxError
from llmux.names import escape
from llmux.ports import LaunchSpec, UnitHandle
from llmux.protocol import Address
from llmux.runtime.engines.limits import unit_properties
from llmux.runtime.host import Drivers, Places

log = logging.getLogger("llmux")

# sun_path holds 107 bytes; the engine's own sockets below the same directory need room for a uuid.
LONGEST_DIRECTORY = 48

OFFLINE: Mapping[str, str] = MappingProxyType(
    {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
)
_UNCLEAR = re.compile(r"[^A-Za-z0-9_.-]|^\.")

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


def engine_directory(model: str, places: Places) -> str:
    """The model's directory for sockets; a long name is cut and made unique by its hash."""
    name = escape(model)
    if len(name) > LONGEST_DIRECTORY:
        name = _cut(name, model)
    return f"{places.runtime}/engines/{name}"


def home_name(model: str) -> str:
    """The name of the model's home: nothing in it means anything to a shell, as compilers of
    kernels pass it through one."""
    name = _UNCLEAR.sub("-", model)
    plain = name == model and not name.startswith("-") and len(name) <= LONGEST_DIRECTORY
    return name if plain else _cut(name.lstrip("-.") or "model", model)


def _cut(name: str, model: str) -> str:
    digest = hashlib.sha256(model.encode()).hexdigest()[:12]
    return f"{name[: LONGEST_DIRECTORY - 13]}-{digest}"


def engine_address(config: ModelConfig, places: Places) -> Address:
    if config.port is not None:
        return Address(port=config.port)
    return Address(uds=f"{engine_directory(config.name, places)}/api.sock")


def _launch(config: ModelConfig, address: Address, command: tuple[str, ...]) -> Launch:
    return Launch(
        name=config.name,
        model_path=config.model_path,
        command=config.vllm_command or command,
        extra_args=config.extra_args,
        evictions=config.rungs,
        ranks=config.ranks,
        gpu_memory=config.gpu_memory,
        uds=address.uds,
        port=address.port,
    )


def engine_argv(config: ModelConfig, address: Address, command: tuple[str, ...]) -> tuple[str, ...]:
    return config.engine_type.argv(_launch(config, address, command))


def engine_environment(
    config: ModelConfig, gpus: tuple[int, ...], places: Places
) -> Mapping[str, str]:
    dropped = {*PRIVATE, *config.engine_type.owned_variables}
    env = {key: value for key, value in places.environment.items() if key not in dropped}
    home = _enter_user(env, config, places)
    env["PATH"] = _search_path(config, places, env.get("PATH", os.defpath))
    launch = _launch(config, engine_address(config, places), places.vllm_command)
    directory = engine_directory(config.name, places)
    env.update(config.engine_type.environment(launch, directory, home))
    if gpus:
        visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # the operator's own restriction of the unit is respected: our index counts within it
        chosen = [visible[g] if visible != [""] and g < len(visible) else str(g) for g in gpus]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        # CUDA counts the fastest GPU first by default; NVML, and with it llmux, by PCI address
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    env.update(config.env)
    return env


def launch_digest(config: ModelConfig, gpus: tuple[int, ...], places: Places) -> str:
    """Equal for configurations that start the same engine: command line, environment and limits."""
    argv = engine_argv(config, engine_address(config, places), places.vllm_command)
    env = engine_environment(config, gpus, places)
    limits = repr(unit_properties(config.limits))
    text = "\0".join((*argv, "", *(f"{name}={env[name]}" for name in sorted(env)), limits))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _search_path(config: ModelConfig, places: Places, path: str) -> str:
    """The program's own directory first, as in an activated virtual environment: compilers of
    kernels look for ninja there."""
    found = shutil.which((config.vllm_command or places.vllm_command)[0], path=path)
    if found is None:
        return path
    own = os.path.dirname(found)
    return os.pathsep.join([own, *(part for part in path.split(os.pathsep) if part != own)])


async def refuse_strangers(
    drivers: Drivers, model: str, address: Address, handle: UnitHandle | None
) -> None:
    """Raises EngineUnhealthy when a connection to the address may reach a process that is not of
    the unit: it would get clients' prompts, and its answers would pass for the model's."""
    stranger = await drivers.units.stranger(address, handle)
    if stranger is not None:
        where = address.uds or f"port {address.port}"
        hint = "end that process"
        if address.port is not None:
            hint += "; or remove `port`: then the engine gets a unix socket"
        target = f'{where} for model "{model}"'
        raise EngineUnhealthy("use", target, f"{stranger} listens there", hint=hint)


def require_model(config: ModelConfig) -> None:
    """Raises LlmuxError where the model's own path is missing: sooner, and clearer, than the
    engine does."""
    path = config.model_path
    if path.startswith("/") and not os.path.exists(path):
        raise LlmuxError(
            f'cannot start model "{config.name}": {path} does not exist',
            hint=f"put the model there, or change models.{config.name}.model_path",
        )


def require_whole_gpus(config: ModelConfig, env: Mapping[str, str]) -> None:
    """Raises LlmuxError where the unit's environment gives the engine a MIG device: what it holds
    would be counted as a part of the whole GPU's memory."""
    if "MIG-" in env.get("CUDA_VISIBLE_DEVICES", ""):
        raise LlmuxError(
            f'cannot start model "{config.name}": CUDA_VISIBLE_DEVICES of the service names a MIG'
            " device, and llmux divides whole GPUs",
            hint="switch MIG off (`nvidia-smi -mig 0`), and name GPUs by index or UUID",
        )


def _enter_user(env: dict[str, str], config: ModelConfig, places: Places) -> str | None:
    """Set who the engine is, and where its files are; returns its home when that is its alone."""
    if places.users is None:
        if "HOME" not in env:
            own = pwd.getpwuid(os.geteuid())
            env["HOME"] = own.pw_dir
            env["USER"] = env["LOGNAME"] = own.pw_name
        return None
    user = places.users.find(config.name)
    env["HOME"] = user.home
    env["USER"] = env["LOGNAME"] = user.name
    if user.temporary is None:
        return None
    env["TMPDIR"] = user.temporary
    return user.home


def warn_about(config: ModelConfig, version: str | None) -> None:
    """Log that the engine's version is known to break what the model's parking needs. What it does
    is verified anyway: memory that is not freed ends in a stop."""
    engine = config.engine_type
    sleeps = any(rung.weights is not Weights.RETAIN for rung in config.rungs)
    fault = engine.version_fault(version or "", sleeps)
    if fault is not None and fault.serious:
        log.warning(
            "%s %s of %s: %s; %s",
            engine.title,
            version,
            config.name,
            fault.problem,
            fault.remedy,
            extra={"model": config.name},
        )


def offline(config: ModelConfig, env: Mapping[str, str], drivers: Drivers) -> Mapping[str, str]:
    """For a model that is to be checkpointed and whose files are here: its client of the Hugging
    Face hub would ask at each start, and keep a connection that no image can hold. Not part of the
    digest: files may come later, and the running engine is none the worse for it."""
    if not config.makes_images:
        return {}
    here = drivers.files_are_here
    return OFFLINE if here is not None and here(config.model_path, env) else {}


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
        env={**offline(config, env, drivers), **env},
        user=places.users.find(config.name) if places.users is not None else None,
        stdout=stdout,
        stderr=stderr,
        runtime_dir=engine_directory(config.name, places),
        properties=unit_properties(config.limits),
    )
