"""The package under a later number, for upgrades."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from llmux_guest import ROOT


@pytest.fixture(scope="session")
def next_package() -> Iterator[Path]:
    """The package of this tree as version 9.9.9."""
    with TemporaryDirectory() as directory:
        build = [str(ROOT / "scripts/build-deb"), "--version", "9.9.9", "--output", directory]
        subprocess.run(build, check=True)
        (deb,) = Path(directory).glob("*.deb")
        yield deb
