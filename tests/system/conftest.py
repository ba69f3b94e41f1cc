"""Fixtures of the system tests. A guest lives as long as the module that shares it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from llmux_guest import Guest, LlmuxGuest, build_package


@pytest.fixture(scope="session")
def package() -> str:
    """Path of the .deb of this tree."""
    return build_package()


@pytest.fixture(scope="module")
def llmux(package: str) -> Iterator[LlmuxGuest]:
    """A Debian 13 guest with the package installed; nothing of it runs."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a guest with its own PID 1")
    with Guest.up(debs=[package]) as guest:
        yield LlmuxGuest(guest)
