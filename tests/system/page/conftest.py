"""One browser and one server for all tests of the page that do not end it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from page_browser import Browser, chromium
from page_server import Daemon, served

MODELS: dict[str, dict[str, object]] = {"alpha": {}, "beta": {}}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def _server() -> Iterator[tuple[Daemon, int]]:
    with served({name: dict(model) for name, model in MODELS.items()}) as running:
        yield running


@pytest.fixture
def server(_server: tuple[Daemon, int]) -> Iterator[tuple[Daemon, int]]:
    """The shared server, at rest: nothing is ordered, no engine misbehaves."""
    daemon, _ = _server
    yield _server
    for path in daemon.directory.glob("*.faults"):
        path.unlink()
    daemon.ask("unpin")
    for name in daemon.listed():
        daemon.park(name, "retain+stop")
    daemon.set_models({name: dict(model) for name, model in MODELS.items()})
