"""What an engine is made of, for the manifest of its image: program, libraries, driver, GPU.

Everything is read from files; nothing is run. See ``images_identity`` for the parts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from llmux.config.schema import ModelConfig
from llmux.drivers.images_identity import host_identity, launch_identity, model_identity
from llmux.ports import LaunchSpec

# Distributions whose version an image depends on, as they name their dist-info directories.
LIBRARIES = ("vllm", "torch", "transformers", "triton", "flashinfer_python")
_DIST_INFO = re.compile(r"([A-Za-z0-9_.]+?)-([^-]+)\.dist-info")
NVIDIA = Path("/proc/driver/nvidia")


def engine_identity(config: ModelConfig, spec: LaunchSpec) -> Mapping[str, str]:
    """Named strings; a difference in any of them makes an image of no use."""
    return {
        **host_identity(),
        **driver_identity(),
        **program_identity(spec.argv[0], spec.env.get("PATH", os.defpath)),
        **launch_identity(spec.argv, spec.env, spec.user),
        **model_identity(config.model_path, spec.env),
    }


def program_identity(program: str, path: str) -> dict[str, str]:
    """The engine's executable, its interpreter's version and the libraries beside it."""
    found = shutil.which(program, path=path)
    if found is None:
        return {"program": f"{program} (not found)"}
    real = os.path.realpath(found)
    identity = {"program": f"{real}, {_stamp(real)}"}
    interpreter = _interpreter(real)
    if interpreter is not None:
        identity["python"] = f"{os.path.realpath(interpreter)}, {_stamp(interpreter)}"
        for directory in _site_packages(interpreter):
            identity.update(_versions(directory))
    return identity


def _stamp(path: str) -> str:
    with suppress(OSError):
        status = os.stat(path)
        return f"{status.st_size} bytes, {status.st_mtime_ns}"
    return "unreadable"


def _interpreter(script: str) -> str | None:
    """From the script's first line; None when it is no script or starts by way of env."""
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


def _versions(directory: Path) -> dict[str, str]:
    versions = {}
    with suppress(OSError):
        for entry in os.listdir(directory):
            match = _DIST_INFO.fullmatch(entry)
            if match and match[1].lower() in LIBRARIES:
                versions[f"version.{match[1].lower()}"] = match[2]
    return versions


def driver_identity(root: Path = NVIDIA) -> dict[str, str]:
    """The NVIDIA driver and every GPU's model and UUID, as the kernel module tells them."""
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
