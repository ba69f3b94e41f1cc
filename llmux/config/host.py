"""Check the configuration against this machine: files, programs and users it names, embedded mode.

``file_faults`` is part of loading. ``check_host`` and ``check_embedded`` are for processes that run
engines here: the same file may be right for another machine. Never changes anything.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Final

from llmux.config.check import Draft, gpu_count_faults
from llmux.config.files.marks import NO_MARKS, Fault, KeyPath, Marks, dotted
from llmux.config.schema import ENGINES, Config, Limits, Process
from llmux.errors import Problem
from llmux.trusted import USE_OWN_DIRECTORY, untrusted


def file_faults(draft: Draft) -> list[Fault]:
    """Report absolute paths that do not exist, and GPUs that there are not. Paths this process may
    not look at pass."""
    return [*_file_faults(draft), *gpu_count_faults(draft)]


def _file_faults(draft: Draft) -> Iterator[Fault]:
    config = draft.config
    yield from _program_faults(draft, ("vllm_command",), config.vllm_command)
    for name, model in config.models.items():
        path: KeyPath = ("models", name)
        own: KeyPath = (*path, "model_path")
        if model.model_path.startswith("/") and draft.sound(own):
            problem = _unfit(model.model_path)
            if problem:
                yield draft.marks.fault(own, f"cannot find the model: {problem}")
        images: KeyPath = (*path, "checkpoint_path")
        if model.checkpoint_path and draft.sound(images):
            problem = _unfit(model.checkpoint_path, stat.S_ISDIR, "a directory")
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
        problem = _unfit(words[0], _runnable, "an executable file (chmod +x?)")
        if problem:
            yield draft.marks.fault(path, f"cannot run vLLM: {problem}")


def _unfit(path: str, fits: Callable[[int], object] = bool, wanted: str = "") -> str | None:
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        return None
    except OSError as error:
        return f"{path}: {str(error.strerror).lower()}"
    return None if fits(mode) else f"{path} is not {wanted}"


def _runnable(mode: int) -> bool:
    # Mode bits, not access(2): the engine runs as another user than this process.
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def check_host(config: Config, marks: Marks = NO_MARKS) -> tuple[Problem, ...]:
    """List what this machine lacks to run the configuration as a service."""
    return tuple(marks.problem(path, message) for path, message in _host_findings(config))


def check_directories(config: Config, marks: Marks = NO_MARKS) -> tuple[Problem, ...]:
    """Directories in which root opens files although another user could put links there."""
    return tuple(marks.problem(path, message) for path, message in _directory_findings(config))


def _directory_findings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    if reason := untrusted(config.checkpoint.images_dir):
        message = f"the images directory is not safe: {reason} ({USE_OWN_DIRECTORY})"
        yield ("checkpoint", "images_dir"), message
    plugins = config.checkpoint.cuda_plugin_dir
    if plugins and (reason := untrusted(plugins)):
        hint = "CRIU loads the libraries in it as root: make it root's, or remove the key"
        yield ("checkpoint", "cuda_plugin_dir"), f"the directory is not safe: {reason} ({hint})"


GATEWAY: Final = "llmux"  # the user of llmux-gateway.service
GATEWAY_RUNTIME: Final = "/run/llmux-gateway"  # RuntimeDirectory= of its unit


def check_gateway_reads(config: Config, marks: Marks = NO_MARKS) -> tuple[Problem, ...]:
    """Files that the gateway's user may not read, although this process may: it could not start.
    Nothing where there is no such user."""
    try:
        entry = pwd.getpwnam(GATEWAY)
    except KeyError:
        return ()
    groups = {entry.pw_gid, *(one.gr_gid for one in grp.getgrall() if GATEWAY in one.gr_mem)}
    settings = config.gateway
    named: list[tuple[KeyPath, str]] = [((), source) for source in config.sources]
    secrets = ("keys_file", "tls_certificate", "tls_key")
    values = {key: getattr(settings, key) for key in secrets}
    named += ((("gateway", k), v) for k, v in values.items() if v and v.startswith("/"))
    problems = []
    for path, file in named:
        if closed := _closed_to(file, entry.pw_uid, groups):
            hint = f"chgrp {GATEWAY} {closed} && chmod g+rX {closed}"
            message = f"the gateway's user {GATEWAY} cannot read {file}: {closed} is closed to it"
            problems.append(marks.problem(path, f"{message} ({hint})"))
    return tuple(problems)


def _closed_to(file: str, uid: int, groups: Container[int]) -> str | None:
    """What on the way to the file keeps the user out: a directory, or the file itself. Where an
    access control list has more to say than the mode, nothing is claimed."""
    way = [*reversed(Path(file).resolve().parents), Path(file).resolve()]
    for path in way:
        try:
            status = path.stat()
            if "system.posix_acl_access" in os.listxattr(path):
                continue
        except OSError:
            return None  # missing: reported elsewhere
        shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
        if not (status.st_mode >> shift) & (0o4 if path == way[-1] else 0o1):
            return str(path)
    return None


def _host_findings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    models = config.models
    yield from _directory_findings(config)
    yield from _no_program(("vllm_command",), config.vllm_command[0], "vLLM", "install vLLM")
    for name, model in models.items():
        if model.vllm_command:
            path: KeyPath = ("models", name, "vllm_command")
            yield from _no_program(path, model.vllm_command[0], "vLLM", "install vLLM")
    user = config.engine_user or ENGINES
    try:
        pwd.getpwnam(user)
    except KeyError:
        hint = f"useradd --system --shell /usr/sbin/nologin {user}"
        yield ("engine_user",), f"the user {user} does not exist (run: {hint})"
    for address in config.gateway.listen:
        place, _, name = address.removeprefix("unix:").rpartition("/")
        if address.startswith("unix:") and place != GATEWAY_RUNTIME:
            hint = f"write unix:{GATEWAY_RUNTIME}/{name}"
            message = f"the service cannot make a socket in {place} ({hint})"
            yield ("gateway", "listen"), message
    processes = {rung.process for model in models.values() for rung in model.rungs}
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
    """List what `llmux serve` cannot do: its engines are child processes, without root."""
    problems = []
    if config.gateway.workers > 1:
        message = (
            f"cannot have {config.gateway.workers} workers in one process: "
            "write 1, or run llmux as a service"
        )
        problems.append(marks.problem(("gateway", "workers"), message))
    for name, model in config.models.items():
        if model.limits != Limits():
            message = "cannot limit engines without systemd: run llmux as a service"
            problems.append(marks.problem(("models", name, "limits"), message))
        processes = [rung.process for rung in model.rungs if rung.process in _NEEDS_SERVICE]
        if processes:
            need = _NEEDS_SERVICE[processes[0]]
            message = (
                f"cannot use {processes[0]} without systemd: it needs {need}. "
                "Use keep_running or stop, or run llmux as a service"
            )
            path: KeyPath = ("models", name, "eviction")
            problems.append(marks.problem(path, message))
    return tuple(problems)
