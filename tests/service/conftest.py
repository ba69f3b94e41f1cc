"""One daemon for all the tests of this folder that do not end it themselves."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from daemon_harness import Daemon, Start

OTHER: dict[str, dict[str, Any]] = {"other": {}}


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    yield
    forked.Server.end()


@pytest.fixture
def start_daemon() -> Iterator[Start]:
    """A daemon of one's own: ``start_daemon({"alpha": {}}, policy={…}, top={…})``."""
    with contextlib.ExitStack() as stack:

        def start(models: dict[str, dict[str, Any]], **settings: Any) -> Daemon:
            return stack.enter_context(_running(models, **settings))

        yield start


@pytest.fixture(scope="session")
def shared() -> Iterator[dict[str, Daemon]]:
    """Holds the shared daemon; another takes its place when a test has ended it."""
    with contextlib.ExitStack() as stack:
        box: dict[str, Daemon] = {}
        box["start"] = stack.enter_context(_running(OTHER))
        yield box


@pytest.fixture
def daemon(shared: dict[str, Daemon]) -> Iterator[Daemon]:
    """The shared daemon with one model, "other", that is up. A test adds what it needs with
    ``set_models``; what it leaves behind is stopped and forgotten."""
    daemon = shared["start"]
    if not daemon.alive:
        pytest.fail("the daemon has ended: " + "\n".join(daemon.log.since(0)[-30:]))
    yield daemon
    if daemon.alive:
        for path in daemon.directory.glob("*.faults"):
            path.unlink()
        daemon.ask("unpin")
        daemon.ask("mode", mode="auto")
        for name in daemon.models:
            daemon.park(name, "retain+stop")
        daemon.set_models(OTHER)


@contextlib.contextmanager
def _running(models: dict[str, dict[str, Any]], **settings: Any) -> Iterator[Daemon]:
    directory = Path(tempfile.mkdtemp(prefix="lx"))  # short: socket paths hold 107 bytes
    daemon = Daemon(directory, models, **settings)
    try:
        daemon.start()
        yield daemon
    finally:
        if daemon.alive:
            daemon.stop(signal.SIGTERM)
        shutil.rmtree(directory, ignore_errors=True)
