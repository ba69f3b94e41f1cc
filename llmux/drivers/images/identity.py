"""What an image was made for, as a flat mapping of named strings that can be compared and shown.

A restored engine keeps the arguments, environment, weights and libraries of the dump. So all of
them are in here, and a difference means a cold start.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from llmux.engines import is_shown_variable

BOOT_ID: Final = "boot_id"
_READ_WHOLE: Final = 1 << 30
_END: Final = 16 << 20
# A token in the middle of a name is one of text: --max-num-batched-tokens, --tokenizer.
_SECRET_ARGUMENT: Final = re.compile(
    r"^--?[\w-]*((api-?key|secret|password)[\w-]*|token)$", re.IGNORECASE
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


def hide(value: str, key: bytes | None = None) -> str:
    """``key``: that of this machine by default."""
    digest = hashlib.blake2b(
        value.encode(errors="surrogateescape"), key=key or _machine_key(), digest_size=8
    )
    return f"hash:{digest.hexdigest()}"


def stamp(path: str) -> str | None:
    """Changes when the file is written on this host; None when it cannot be looked at."""
    with suppress(OSError):
        status = os.stat(path)
        return f"{status.st_size} bytes, {status.st_mtime_ns}"
    return None


def content_stamp(path: str) -> str | None:
    """Equal for equal files of two hosts, whose times differ. Of a file over 1 GiB only the ends
    are read: it holds weights, and their revision is compared as well."""
    with suppress(OSError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        parts = [(0, size)] if size <= _READ_WHOLE else [(0, _END), (size - _END, size)]
        for start, end in parts:
            file.seek(start)
            while start < end and (piece := file.read(min(end - start, 1 << 20))):
                digest.update(piece)
                start += len(piece)
        return f"{size} bytes, sha256 {digest.hexdigest()[:32]}"
    return None


@dataclass(frozen=True, slots=True)
class Shown:
    """How an identity shows a secret value and the state of a file."""

    hide: Callable[[str], str] = hide
    stamp: Callable[[str], str | None] = stamp

    @classmethod
    def portable(cls, salt: bytes) -> Shown:
        """Comparable on hosts that know ``salt``; local hashes and times are not."""
        return cls(partial(hide, key=salt), content_stamp)


HERE: Final = Shown()


def hidden_argv(argv: Sequence[str], shown_as: Shown = HERE) -> str:
    """The command line for people, values of secret options hashed."""
    shown = []
    secret_next = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if secret_next and not argument.startswith("-"):
            shown.append(shown_as.hide(argument))
            secret_next = False
        elif _SECRET_ARGUMENT.match(name):
            shown.append(f"{name}={shown_as.hide(value)}" if equals else argument)
            secret_next = not equals
        else:
            shown.append(argument)
            secret_next = False
    return " ".join(shown)


def launch_identity(
    argv: Sequence[str], env: Mapping[str, str], user: str | None, shown: Shown = HERE
) -> dict[str, str]:
    return {
        "arguments": hidden_argv(argv, shown),
        "user": user or "root",
        # a mismatch shows variables without secrets; others are hashed
        **{
            f"env.{key}": value if is_shown_variable(key) else shown.hide(value)
            for key, value in env.items()
        },
    }


def host_identity(
    boot_id_path: str = "/proc/sys/kernel/random/boot_id",
    driver_path: str = "/proc/driver/nvidia/version",
    processors_path: str = "/proc/cpuinfo",
) -> dict[str, str]:
    """Kernel, driver, processor and boot: images last until the reboot by default, because pids,
    /dev/shm, runtime directories and the GPU driver's state do not."""
    identity = {"kernel": platform.release(), "architecture": platform.machine()}
    with suppress(OSError), open(driver_path) as file:
        identity["nvidia_driver"] = " ".join(file.readline().split())
    with suppress(OSError), open(boot_id_path) as file:
        identity[BOOT_ID] = file.read().strip()
    with suppress(OSError), open(processors_path) as file:
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


def hub_cache(env: Mapping[str, str]) -> str:
    """Where a client of the Hugging Face hub keeps what it downloaded."""
    home = env.get("HF_HOME") or os.path.join(env.get("HOME", "/root"), ".cache", "huggingface")
    return env.get("HF_HUB_CACHE") or os.path.join(home, "hub")


def model_directory(model_path: str, env: Mapping[str, str]) -> str | None:
    """Where its files are: a directory of the host's, or a snapshot in the cache of the hub."""
    return model_path if os.path.isdir(model_path) else _snapshot(model_path, hub_cache(env))


def model_files_are_here(model_path: str, env: Mapping[str, str]) -> bool:
    """All files of the model are in a directory of this host, or in its cache of the hub, where no
    download is under way or was broken off."""
    return os.path.isdir(model_path) or missing_of_model(model_path, env) is None


def missing_of_model(model_path: str, env: Mapping[str, str]) -> str | None:
    """What the cache of the hub lacks of the model, in words; None when it is complete."""
    directory = _snapshot(model_path, hub_cache(env))
    if directory is None:
        return "it is not there"
    try:
        names = set(os.listdir(directory))
        blobs = os.listdir(os.path.join(directory, os.pardir, os.pardir, "blobs"))
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if any(name.endswith(".incomplete") for name in blobs):
        return "its download is under way, or was broken off"
    if "config.json" not in names:
        return "it has no config.json"
    try:
        with open(os.path.join(directory, "model.safetensors.index.json")) as file:
            absent = set(json.load(file)["weight_map"].values()) - names
            return f"it lacks {min(absent)}" if absent else None
    except FileNotFoundError:
        there = any(name.endswith(".safetensors") for name in names)
        return None if there else "it has no *.safetensors"
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return "its model.safetensors.index.json cannot be read"


def model_identity(
    model_path: str, env: Mapping[str, str], revision: str | None = None, shown: Shown = HERE
) -> dict[str, str]:
    """Path and revision of the weights: the snapshot's commit where one shows, else the files'
    sizes and times. Reads no weights."""
    identity = {"model_path": model_path}
    directory = model_directory(model_path, env)
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
            if (state := shown.stamp(os.path.join(directory, name))) is not None:
                identity[f"file.{name}"] = state
    return identity
