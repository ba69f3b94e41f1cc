"""Engines for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger import Ledger
from standin_engines import Engine, Start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start engines that share one ledger."""
    engines: list[Engine] = []

    def begin(name: str = "alpha", *flags: str, ready: bool = True, **env: str) -> Engine:
        ledger = ("--standin-ledger", str(tmp_path / "ledger.json"))
        engine = Engine(tmp_path, name, "--enable-sleep-mode", *ledger, *flags, env=env)
        engines.append(engine)
        return engine.wait_ready() if ready else engine

    yield begin
    for engine in engines:
        engine.kill()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "ledger.json"))


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for the tests that only ask it things."""
    engine = Engine(tmp_path_factory.mktemp("alpha"), "alpha", "--max-model-len", "1K")
    yield engine.wait_ready()
    engine.kill()


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"
