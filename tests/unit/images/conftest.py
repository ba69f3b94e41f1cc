"""A directory that images are safe in."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest


@pytest.fixture
def home() -> Iterator[pathlib.Path]:
    """Below /, whose every parent is root's or ours: pytest uses directories of others. Short, as a
    socket's path has 107 bytes."""
    path = pathlib.Path(f"/var/tmp/llmux-home-{os.getpid()}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def all_is_closed(no_descriptor_left_open: None) -> None:
    """For each test here."""
