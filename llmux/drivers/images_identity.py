"""What an image was made for, as a flat mapping of named strings that can be compared and shown.

An engine that comes back from an image cannot be told anything new: arguments, environment,
weights and libraries are those of the dump. So all of them are in here, and a difference is a
cold start.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

BOOT_ID: Final = "boot_id"
# Environment variables that hold no secrets, so a mismatch can show them; others are hashed.
SHOWN: Final = re.compile(
    r"^(VLLM_(?!.*(KEY|TOKEN|SECRET|PASSWORD))|CUDA_VISIBLE|CUDA_DEVICE|NCCL_|OMP_|TORCH|HF_HUB_OFFLINE$"
    r"|TRANSFORMERS_OFFLINE$|UV_USE_IO_URING$|USE_LIBUV$|NO_COLOR$|DO_NOT_TRACK$|LANG$|LC_|TZ$|PATH$|HOME$"
    r"|PYTHONNODEBUGRANGES$)"
)
_SECRET_ARGUMENT: Final = re.compile(
    r"^--?[\w-]*(api-?key|token|secret|password)[\w-]*", re.IGNORECASE
)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_TOKENIZER_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)


def _machine_key() -> bytes:
    """A key of this machine, so that a hash of a short secret cannot be looked up elsewhere."""
    with suppress(OSError), open("/etc/machine-id", "rb") as file:
        return file.read().strip()[:64]
    return b"llmux"


def hide(value: str) -> str:
    digest = hashlib.blake2b(
        value.encode(errors="surrogateescape"), key=_machine_key(), digest_size=8
    )
    return f"hash:{digest.hexdigest()}"


def hidden_argv(argv: Sequence[str]) -> str:
    """The command line for people, values of secret options hashed."""
    shown = []
    secret_next = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if secret_next and not argument.startswith("-"):
            shown.append(hide(argument))
            secret_next = False
        elif _SECRET_ARGUMENT.match(name):
            shown.append(f"{name}={hide(value)}" if equals else argument)
            secret_next = not equals
        else:
            shown.append(argument)
            secret_next = False
    return " ".join(shown)


def launch_identity(
    argv: Sequence[str], env: Mapping[str, str], user: str | None
) -> dict[str, str]:
    return {
        "arguments": hidden_argv(argv),
        "user": user or "root",
        **{f"env.{key}": value if SHOWN.match(key) else hide(value) for key, value in env.items()},
    }


def host_identity(boot_id_path: str = "/proc/sys/kernel/random/boot_id") -> dict[str, str]:
    """Kernel, processor and boot: images last until the reboot by default, because pids,
    /dev/shm, runtime directories and the GPU driver's state do not."""
    identity = {"kernel": platform.release(), "architecture": platform.machine()}
    with suppress(OSError), open(boot_id_path) as file:
        identity[BOOT_ID] = file.read().strip()
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            # CRIU restores register state; another processor may lack the instructions in use.
            if line.startswith("model name"):
                identity["processor"] = line.partition(":")[2].strip()
                break
    return identity


def _snapshot(model_path: str, hub: str) -> str | None:
    """The directory of a repository's snapshot in the Hugging Face cache, by its ``main``."""
    folder = os.path.join(hub, "models--" + model_path.replace("/", "--"))
    with suppress(OSError), open(os.path.join(folder, "refs", "main")) as file:
        commit = file.read().strip()
        if _COMMIT.fullmatch(commit):
            return os.path.join(folder, "snapshots", commit)
    return None


def model_identity(
    model_path: str, env: Mapping[str, str], revision: str | None = None
) -> dict[str, str]:
    """Path and revision of the weights: the snapshot's commit where one shows, else the files'
    sizes and times. Reads no weights."""
    identity = {"model_path": model_path}
    home = env.get("HF_HOME") or os.path.join(env.get("HOME", "/root"), ".cache", "huggingface")
    hub = env.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    directory = model_path if os.path.isdir(model_path) else _snapshot(model_path, hub)
    if revision:
        identity["revision"] = revision
    elif directory and (commit := _COMMIT.search(os.path.basename(os.path.realpath(directory)))):
        identity["revision"] = commit[0]
    if directory and os.path.isdir(directory):
        names = {
            *_TOKENIZER_FILES,
            *(n for n in os.listdir(directory) if n.endswith(".safetensors")),
        }
        for name in sorted(names):
            with suppress(OSError):
                status = os.stat(os.path.join(directory, name))
                identity[f"file.{name}"] = f"{status.st_size} bytes, {status.st_mtime_ns}"
    return identity
