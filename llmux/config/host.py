"""Does the configuration fit this machine: the files and programs it names, users, embedded mode.

``file_faults`` is part of loading. ``check_host`` and ``check_embedded`` are asked by whoever is
about to run engines here: the same file may be right for another machine. Never changes anything.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from typing import Final

from llmux.config.check import Draft
from llmux.config.marks import NO_MARKS, Fault, KeyPath, Marks, dotted
from llmux.config.schema import Config, Process
from llmux.errors import Problem


def file_faults(draft: Draft) -> list[Fault]:
    """Absolute paths that must exist. A path this process may not look at is not reported."""
    return list(_file_faults(draft))


def _file_faults(draft: Draft) -> Iterator[Fault]:
    config = draft.config
    yield from _program_faults(draft, ("vllm_command",), config.vllm_command)
    for name, model in config.models.items():
        path: KeyPath = ("models", name)
        own: KeyPath = (*path, "model_path")
        if model.model_path.startswith("/") and draft.sound(own):
            problem = _missing(model.model_path)
            if problem:
                yield draft.marks.fault(own, f"cannot find the model: {problem}")
        images: KeyPath = (*path, "checkpoint_path")
        if model.checkpoint_path and draft.sound(images):
            problem = _missing(model.checkpoint_path, directory=True)
            if problem:
                message = (
                    f"cannot find the checkpoint: {problem} "
                    "(remove the key to let llmux make a checkpoint in images_dir)"
                )
                yield draft.marks.fault(images, message)
        if model.vllm_command:
            yield from _program_faults(draft, (*path, "vllm_command"), model.vllm_command)


def _program_faults(draft: Draft, path: KeyPath, words: tuple[str, ...]) -> Iterator[Fault]:
    if words[0].startswith("/") and draft.sound(path):
        problem = _not_executable(words[0])
        if problem:
            yield draft.marks.fault(path, f"cannot run vLLM: {problem}")


def _missing(path: str, *, directory: bool = False) -> str | None:
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        return None
    except OSError as error:
        return f"{path}: {str(error.strerror).lower()}"
    return f"{path} is not a directory" if directory and not stat.S_ISDIR(mode) else None


def _not_executable(path: str) -> str | None:
    problem = _missing(path)
    if problem:
        return problem
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    # Mode bits, not access(2): the engine runs as another user than the one who checks.
    runnable = stat.S_ISREG(mode) and mode & 0o111
    return None if runnable else f"{path} is not an executable file (chmod +x?)"


def check_host(config: Config, marks: Marks = NO_MARKS) -> tuple[Problem, ...]:
    """What this machine lacks to run the configuration as a service."""
    return tuple(marks.problem(path, message) for path, message in _host_findings(config))


def _host_findings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    models = config.models
    yield from _no_program(("vllm_command",), config.vllm_command[0], "vLLM", "install vLLM")
    for name, model in models.items():
        if model.vllm_command:
            path: KeyPath = ("models", name, "vllm_command")
            yield from _no_program(path, model.vllm_command[0], "vLLM", "install vLLM")
    try:
        pwd.getpwnam(config.engine_user)
    except KeyError:
        hint = f"useradd --system --shell /usr/sbin/nologin {config.engine_user}"
        yield ("engine_user",), f"the user {config.engine_user} does not exist (run: {hint})"
    processes = {model.eviction.process for model in models.values()}
    images = any(model.checkpoint_path for model in models.values())
    dumps = images or Process.CHECKPOINT in processes
    checkpoint = config.checkpoint
    if dumps:
        hint = "install CRIU, or use another eviction than checkpoint"
        yield from _no_program(("checkpoint", "criu_path"), checkpoint.criu_path, "CRIU", hint)
        plugins = checkpoint.cuda_plugin_dir
        if plugins and not os.path.isdir(plugins):
            missing = f"the directory {plugins} does not exist (remove the key to do without it)"
            yield ("checkpoint", "cuda_plugin_dir"), missing
    tool = checkpoint.cuda_checkpoint_path
    if tool and (dumps or Process.CUDA_SUSPEND in processes):
        hint = "remove the key to use the driver itself"
        yield from _no_program(("checkpoint", "cuda_checkpoint_path"), tool, "CUDA suspend", hint)


def _no_program(path: KeyPath, program: str, what: str, hint: str) -> Iterator[tuple[KeyPath, str]]:
    if shutil.which(program) is None:
        place = "is missing or not executable" if "/" in program else "is not on PATH"
        yield path, f"cannot run {what}: {program} {place} ({hint}, or set {dotted(path)})"


_NEEDS_SERVICE: Final = {
    Process.FREEZE: "the cgroup freezer",
    Process.CUDA_SUSPEND: "the cgroup freezer",
    Process.CHECKPOINT: "root and CRIU",
}


def check_embedded(config: Config, marks: Marks = NO_MARKS) -> tuple[Problem, ...]:
    """What `llmux serve` cannot do: its engines are plain child processes, without root."""
    problems = []
    if config.gateway.workers > 1:
        message = (
            f"cannot have {config.gateway.workers} workers in one process: "
            "write 1, or run llmux as a service"
        )
        problems.append(marks.problem(("gateway", "workers"), message))
    for name, model in config.models.items():
        need = _NEEDS_SERVICE.get(model.eviction.process)
        if need:
            message = (
                f"cannot use {model.eviction.process} without systemd: it needs {need}. "
                "Use keep_running or stop, or run llmux as a service"
            )
            path: KeyPath = ("models", name, "eviction")
            problems.append(marks.problem(path, message))
    return tuple(problems)
