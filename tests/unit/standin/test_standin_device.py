"""What vLLM says when another engine moves memory of its GPU beside it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger import GIB, Ledger, find_start_time
from standin_engines import Engine, Start

pytestmark = pytest.mark.long

CHECKED = ("--standin-device-checks", "--standin-weights-gib", "16")
Other = Callable[[int], None]


@pytest.fixture
def other(ledger: Ledger) -> Iterator[Other]:
    """Another process holds so many GiB of GPU 0 from now on."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as child:
        start = find_start_time(child.pid) or 0
        yield lambda gib: ledger.allocate(0, child.pid, start, "other", {"weights": gib * GIB})
        child.kill()


def complaints(ledger: Ledger) -> str:
    path = Path(f"{ledger.path}.complaints")
    return path.read_text() if path.exists() else ""


def profiling(start: Start, ledger: Ledger) -> Engine:
    """An engine that has its weights, and a while until it looks again."""
    engine = start("alpha", *CHECKED, "--standin-profile-secs", "1.5", ready=False)
    deadline = time.monotonic() + 10
    while "weights" not in ledger.show()["models"].get("alpha", {}):
        assert time.monotonic() < deadline, engine.log
    return engine


def test_alone_nothing_is_complained_of(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", *CHECKED)
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}
    engine.post("/sleep?level=1")
    engine.post("/wake_up")
    assert engine.say().startswith("alpha:")
    assert complaints(ledger) == ""


def test_engines_of_several_users_share_a_device(start: Start, ledger: Ledger) -> None:
    """What the first one leaves beside the ledger is open to all, whatever its umask."""
    former = os.umask(0o077)
    try:
        start("alpha", *CHECKED)
    finally:
        os.umask(former)
    left = list(Path(ledger.path).parent.glob(f"{Path(ledger.path).name}*"))
    assert {f"{ledger.path}.lock", f"{ledger.path}.moving.0"} <= {str(path) for path in left}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in left} == {
        path.name: "0o666" for path in left
    }


def test_too_little_is_free_at_start(start: Start, ledger: Ledger, other: Other) -> None:
    other(20)
    engine = start("alpha", *CHECKED, ready=False)
    assert engine.wait_exit() != 0
    assert (
        "Free memory on device cuda:0 (60.00/80.00 GiB) on startup is less than desired GPU memory"
        " utilization (0.9, 72.00 GiB)" in engine.log
    )
    assert "Free memory on device" in complaints(ledger)


def test_memory_that_is_freed_meanwhile(start: Start, ledger: Ledger, other: Other) -> None:
    other(8)
    engine = profiling(start, ledger)
    other(1)
    assert engine.wait_exit() != 0
    assert "Error in memory profiling. Initial free memory 72.00 GiB" in engine.log


def test_memory_that_is_taken_meanwhile(start: Start, ledger: Ledger, other: Other) -> None:
    engine = profiling(start, ledger)
    other(8)
    engine.wait_ready()
    assert ledger.usage_by_model()["alpha"] == 64 * GIB, "its KV cache is smaller by that"
    assert "8.00 GiB of another engine are taken for its own" in complaints(ledger)


def test_nothing_is_left_for_the_cache(start: Start, ledger: Ledger, other: Other) -> None:
    engine = profiling(start, ledger)
    other(60)
    assert engine.wait_exit() != 0
    assert "ValueError: No available memory for the cache blocks." in engine.log


@pytest.mark.parametrize("call", ["/sleep?level=1", "/wake_up"])
def test_another_engine_moves_memory(start: Start, ledger: Ledger, call: str) -> None:
    engine = start("alpha", *CHECKED)
    if call == "/wake_up":
        engine.post("/sleep?level=1")
    fd = os.open(f"{ledger.path}.moving.0", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert engine.ask("POST", call)[0] == 500
    finally:
        os.close(fd)
    assert engine.read_until("EngineDeadError")
    assert "while another engine moves memory" in complaints(ledger)
