"""Programs of the distribution that these tests run: found, or installed where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def need(program: str, package: str) -> str:
    """Path of ``program``; the package's service is not started. Skips where it cannot be had."""
    found = shutil.which(program)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        # The helper of scripts/_env.sh, without the environment that the file makes when sourced.
        script = (
            'eval "$(sed -n "/^_llmux_say/p;/^_llmux_apt()/,/^}/p" scripts/_env.sh)"; '
            '_llmux_apt "$1"'
        )
        environment = os.environ | {"RUNLEVEL": "1"}  # invoke-rc.d starts nothing in runlevel 1
        subprocess.run(
            ["bash", "-c", script, "need", package], cwd=ROOT, env=environment, check=False,
            timeout=300,
        )  # fmt: skip
        found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed; next step: sudo apt-get install {package}")
    return found
