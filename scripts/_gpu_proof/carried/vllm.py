"""``--vllm-carry DIR``: the real vLLM for a GPU host without network, in 60 MiB.

For a host with Python 3.12, PyTorch 2.11 with CUDA 13 and transformers, as vLLM 0.20.2 pins them.
Its wheel has 244 MB of kernels for seven architectures: those of one are kept (``fatbins.py``), and
libraries that a plain decoder does without are left out. So are packages that the host has with
PyTorch and transformers. ``DIR/install`` puts it into place there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from _gpu_proof.carried import fatbins

VERSION = "0.20.2"
PYTHON = "3.12"
GLIBC = (39, 35, 31, 28, 27, 24, 17, 12, 5)  # Ubuntu 24.04 has 2.39
ARCHITECTURE = 90  # H100, H200
MOST = 60 << 20
ARCHIVE = "vllm.tar.xz"
# Kernels of mixtures of experts, of FlashAttention 2 (Hopper has 3), of MLA, of fp8 block scales.
LEFT_OUT = (
    "vllm/_moe_C",
    "vllm/vllm_flash_attn/_vllm_fa2_C",
    "vllm/_flashmla",
    "vllm/third_party/deep_gemm/",
    "vllm/entrypoints/serve/instrumentator/static/",
    "pycountry/locales/",
    "mistral_common/data/",
)
KERNELS = re.compile(r"vllm/.*\.so")
# What vLLM's command line, API server and engine import, and PyTorch and transformers do not bring;
# versions that fit each other and what vLLM asks for.
PACKAGES = Path(__file__).with_name("packages.txt")
# What those ask for and a host with PyTorch and transformers has.
HOST = frozenset(
    {
        "certifi",
        "click",
        "filelock",
        "idna",
        "ninja",
        "numba",
        "numpy",
        "opencv-python-headless",
        "packaging",
        "pillow",
        "psutil",
        "pyyaml",
        "regex",
        "requests",
        "sentencepiece",
        "setuptools",
        "six",
        "tokenizers",
        "torch",
        "torchaudio",
        "torchvision",
        "tqdm",
        "transformers",
        "triton",
        "typing-extensions",
    }
)
# What is asked for, and not needed by a plain decoder on its own attention: each was seen missing
# by a vLLM that served on an H200.
ABSENT = frozenset(
    {
        "anthropic",
        "fastsafetensors",
        "flashinfer-cubin",
        "flashinfer-python",
        "mcp",
        "nvidia-cudnn-frontend",
        "nvidia-cutlass-dsl",
        "opentelemetry-exporter-otlp",
        "quack-kernels",
        "supervisor",
        "tilelang",
    }
)
INSTALL = """#!/bin/sh
# Unpacks the carried vLLM into /opt/vllm-carry. Needs root, and a Python 3.12 with PyTorch 2.11:
# install [PYTHON]
set -eu
here=$(dirname "$(readlink -f "$0")")
python=$(command -v "${1:-python3}")
rm -rf /opt/vllm-carry
mkdir -p /opt/vllm-carry/bin
tar -xJf "$here/vllm.tar.xz" -C /opt/vllm-carry
cat > /opt/vllm-carry/bin/vllm <<EOF
#!$python
import os, sys
sys.path.insert(0, "/opt/vllm-carry/site")
os.environ["PYTHONPATH"] = "/opt/vllm-carry/site"  # its engine is a process of its own
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
EOF
chmod +x /opt/vllm-carry/bin/vllm
PYTHONPATH=/opt/vllm-carry/site "$python" /opt/vllm-carry/make_model.py /opt/vllm-carry/model
echo "scripts/gpu-proof --vllm /opt/vllm-carry/bin/vllm --vllm-model /opt/vllm-carry/model"
"""


def collect(directory: Path) -> int:
    """Returns the exit status. Packages come from the index that pip is configured for."""
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-proof-vllm-", dir=_scratch()) as scratch:
            tree = Path(scratch) / "tree"
            wheels = download(Path(scratch) / "wheels")
            if lacking := missing(wheels):
                print(f"packages.txt does not fit: {'; '.join(lacking)}", file=sys.stderr)
                return 1
            unpack(wheels, tree / "site")
            own = Path(__file__).parent
            shutil.copy(own / "make_model.py", tree)
            shutil.copy(own.parents[1] / "_lab" / "tiny_models.py", tree)
            directory.mkdir(parents=True, exist_ok=True)
            pack(tree, directory / ARCHIVE)
    except (OSError, subprocess.CalledProcessError, fatbins.BadLibraryError) as error:
        print(f"cannot collect vLLM: {error}", file=sys.stderr)
        return 1
    script = directory / "install"
    script.write_text(INSTALL)
    script.chmod(0o755)
    size = (directory / ARCHIVE).stat().st_size
    print(f"{directory}: {size / (1 << 20):.1f} MiB; run {script} on the GPU host")
    if size > MOST:
        print(f"that is more than {MOST >> 20} MiB", file=sys.stderr)
        return 1
    return 0


def _scratch() -> str:
    return "/var/tmp"  # /tmp may be a tmpfs; the directory below it is private


# ---- getting ------------------------------------------------------------------------------------


def download(target: Path) -> list[Path]:
    """vLLM's wheel and those of PACKAGES."""
    platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", *platforms]
    command += ["--dest", str(target), "-r", str(PACKAGES), f"vllm=={VERSION}"]
    subprocess.run(command, check=True)
    return sorted(target.glob("*.whl"))


def missing(wheels: Sequence[Path]) -> list[str]:
    """What the wheels ask for and nobody brings, or in another version; in words."""
    from packaging.requirements import Requirement  # comes with pip
    from packaging.utils import canonicalize_name

    target = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.3",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    about = [metadata(wheel) for wheel in wheels]
    versions = {canonicalize_name(each["Name"]): each["Version"] for each in about}
    found = []
    for each in about:
        for text in each.get_all("Requires-Dist", ()):
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            if wanted.marker is not None and not wanted.marker.evaluate(target):
                continue
            if name in HOST | ABSENT:
                continue
            here = versions.get(name)
            if here is None or not wanted.specifier.contains(here, prereleases=True):
                found.append(f"{each['Name']} wants {wanted}, and there is {here or 'none'}")
    return found


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


# ---- packing ------------------------------------------------------------------------------------


def unpack(wheels: Sequence[Path], site: Path) -> None:
    """Into one directory, without what is left out and without other architectures' kernels."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir() or is_left_out(info.filename):
                    continue
                target = site / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                content = bytearray(archive.read(info))
                if KERNELS.fullmatch(info.filename):
                    fatbins.keep_only(content, ARCHITECTURE)
                target.write_bytes(content)


def is_left_out(name: str) -> bool:
    return (
        name.startswith(LEFT_OUT)
        or name.endswith((".dist-info/RECORD", ".pyi", ".pyx", ".map", ".a"))
        or "/tests/" in name
        or ".data/" in name.partition("/")[0] + "/"
    )


def pack(tree: Path, archive: Path) -> None:
    command = ["tar", "--sort=name", "--owner=0", "--group=0", "--use-compress-program=xz -T0 -6"]
    subprocess.run([*command, "-cf", str(archive), "-C", str(tree), "."], check=True)
