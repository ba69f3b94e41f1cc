"""Identify what an engine's image depends on: program, libraries, driver, GPU.

Reads files only, runs nothing. The parts are in ``drivers/images/identity.py``.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from llmux.config.schema import ModelConfig
from llmux.drivers.images.identity import (
    BOOT_ID,
    HERE,
    Shown,
    host_identity,
    launch_identity,
    model_identity,
)
from llmux.ports import EngineUser, LaunchSpec

_DIST_INFO = re.compile(r"([A-Za-z0-9_.]+?)-([^-]+)\.dist-info")
NVIDIA = Path("/proc/driver/nvidia")


def engine_identity(config: ModelConfig, spec: LaunchSpec) -> Mapping[str, str]:
    """Return named strings; an image is unusable when any of them differs."""
    return _identity(config, spec, HERE)


def portable_identity(config: ModelConfig, spec: LaunchSpec, salt: str) -> Mapping[str, str]:
    """Return what two hosts must have in common for an image of one to serve on the other.

    Files count by content, secrets by a hash with ``salt``, the engine's user by its numbers, which
    are in the image. The boot is each host's own.
    """
    identity = _identity(config, spec, Shown.portable(bytes.fromhex(salt)))
    del identity[BOOT_ID]
    return {**identity, **_user_identity(spec.user)}


def _identity(config: ModelConfig, spec: LaunchSpec, shown: Shown) -> dict[str, str]:
    path = spec.env.get("PATH", os.defpath)
    return {
        **host_identity(),
        **driver_identity(),
        **program_identity(spec.argv[0], path, config.engine_type.libraries, shown),
        **launch_identity(spec.argv, spec.env, _shown(spec.user), shown),
        **model_identity(config.model_path, spec.env, shown=shown),
    }


def _shown(user: EngineUser | None) -> str | None:
    """With its groups: a restored engine has those that it had, whatever it would be given now."""
    if user is None:
        return None
    groups = ", ".join(map(str, sorted(user.groups)))
    return f"{user.name} (uid {user.uid}, gid {user.gid}, groups {groups})"


def _user_identity(user: EngineUser | None) -> dict[str, str]:
    uid, gid, groups = 0, 0, [0]
    if user is not None:
        uid, gid, groups = user.uid, user.gid, [*user.groups]
    else:
        with suppress(KeyError):
            entry = pwd.getpwnam("root")
            groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"uid": str(uid), "gid": str(gid), "groups": " ".join(map(str, sorted(groups)))}


def program_identity(
    program: str, path: str, libraries: Collection[str], shown: Shown = HERE
) -> dict[str, str]:
    """The engine's executable, its interpreter's version and the libraries beside it."""
    found = shutil.which(program, path=path)
    if found is None:
        return {"program": f"{program} (not found)"}
    real = os.path.realpath(found)
    identity = {"program": f"{real}, {_state(real, shown)}"}
    interpreter = _interpreter(real)
    if interpreter is not None:
        identity["python"] = f"{os.path.realpath(interpreter)}, {_state(interpreter, shown)}"
        for directory in _site_packages(interpreter):
            identity.update(_versions(directory, libraries))
    return identity


def _state(path: str, shown: Shown) -> str:
    return shown.stamp(path) or "unreadable"


def _interpreter(script: str) -> str | None:
    """The interpreter in the script's first line; None for a binary or a script run via env."""
    with suppress(OSError), open(script, "rb") as file:
        line = file.readline(256)
        if line.startswith(b"#!"):
            words = line[2:].decode(errors="replace").split()
            if words and "python" in os.path.basename(words[0]):
                return words[0]
    return None


def _site_packages(interpreter: str) -> list[Path]:
    prefix = Path(interpreter).parent.parent
    return sorted(prefix.glob("lib*/python3*/site-packages"))


def _versions(directory: Path, libraries: Collection[str]) -> dict[str, str]:
    versions = {}
    with suppress(OSError):
        for entry in os.listdir(directory):
            match = _DIST_INFO.fullmatch(entry)
            if match and match[1].lower() in libraries:
                versions[f"version.{match[1].lower()}"] = match[2]
    return versions


def driver_identity(root: Path = NVIDIA) -> dict[str, str]:
    """The NVIDIA driver and every GPU's model and UUID, as the kernel module reports them."""
    identity = {}
    with suppress(OSError):
        identity["nvidia_driver"] = (root / "version").read_text().splitlines()[0]
    with suppress(OSError):
        for gpu in sorted((root / "gpus").iterdir()):
            for line in (gpu / "information").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("Model", "GPU UUID"):
                    identity[f"gpu.{gpu.name}.{name}"] = value.strip()
    return identity
