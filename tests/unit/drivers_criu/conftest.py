"""Two hosts that images go between."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
from transfer_site import Site


@pytest.fixture
def home() -> Iterator[pathlib.Path]:
    """Below /, whose every parent is root's or ours: pytest uses directories of others."""
    path = pathlib.Path(f"/var/tmp/llmux-transfer-{os.getpid()}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sites(home: pathlib.Path) -> tuple[Site, Site]:
    library = home / "lib.so"
    library.write_bytes(b"ELF")
    library.chmod(0o755)
    there, here = Site(home / "there", library), Site(home / "here", library)
    there.publish()
    return there, here


@pytest.fixture(autouse=True)
def all_is_closed(no_descriptor_left_open: None) -> None:
    """For each test here."""
