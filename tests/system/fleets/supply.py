"""Where a host gets its packages from: an apt repository that is served here, and wheels."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import pathlib
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from typing import Final

from llmux_guest import ROOT, STANDIN


def publish(repository: pathlib.Path) -> str:
    """The package of this tree into the repository, and the index of all in there signed anew."""
    done = subprocess.run(
        [str(ROOT / "scripts/build-deb"), "--repo", str(repository)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def scan(directory: pathlib.Path) -> None:
    """The index of a directory with packages, unsigned."""
    with (directory / "Packages").open("w") as index:
        subprocess.run(
            ["dpkg-scanpackages", "."], cwd=directory, stdout=index, stderr=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip


def version_of(package: str) -> str:
    done = subprocess.run(
        ["dpkg-deb", "--field", package, "Version"], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Not into the test's output."""


@contextlib.contextmanager
def served(directory: pathlib.Path, address: str) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer((address, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{address}:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


_COMMAND: Final = """import os, sys

def main():
    if sys.argv[1:] == ["--version"]:
        print("{version}")
    else:
        os.environ["LAB_VLLM"] = "{version}"
        os.execv("{standin}", ["{standin}", *sys.argv[1:]])
"""


def wheel(version: str) -> bytes:
    """A vLLM whose command is the stand-in engine."""
    info = f"vllm-{version}.dist-info"
    files = {
        "vllm/__init__.py": f"__version__ = '{version}'\n",
        "torch/__init__.py": "",  # which llmux doctor imports in an engine's environment
        "vllm/command.py": _COMMAND.format(version=version, standin=STANDIN),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nvllm = vllm.command:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()
