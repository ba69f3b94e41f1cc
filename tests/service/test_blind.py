"""The real NVML calls, on a library that hangs: what is ordered is done, and nothing is said
that was not seen."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_harness import SECONDS, Daemon, Start, in_background

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_nvml"))

from fake_nvml import FakeNvml

pytestmark = pytest.mark.long

# A look has half a second; on a busy machine the rest takes its time. Before looks had a deadline
# no signal was ever sent.
SIGNALS_SECS = 10.0


@pytest.fixture
def nvml(tmp_path: Path) -> Iterator[FakeNvml]:
    fake = FakeNvml(tmp_path / "nvml", "none yet")
    yield fake
    fake.heal()


@pytest.fixture
def blind(nvml: FakeNvml, start_daemon: Start) -> Daemon:
    """alpha serves, and NVML stands still from now on."""
    library = {"LLMUX_GPU_LEDGER": "", "LLMUX_LIBNVML": str(nvml.library)}
    daemon = start_daemon(
        {"alpha": {"eviction": "offload+keep_running"}},
        policy={"backoff_secs": 0.1, "backoff_max_secs": 0.1},
        environ=library,
    )
    (nvml.directory / "ledger").write_text(f"{daemon.ledger.path}\n")
    assert daemon.chat("alpha").status == 200
    nvml.fault("processes", "hang")
    return daemon


def test_unload_sends_its_signals_at_once_and_tells_the_truth(
    blind: Daemon, nvml: FakeNvml
) -> None:
    began = time.monotonic()
    asking = in_background(lambda: blind.request("POST", "/unload", {"model": "alpha"}))
    while blind.memory():
        assert time.monotonic() < began + SIGNALS_SECS, blind.log.since(0)[-20:]
    print(f"the engine has ended after {time.monotonic() - began:.2f} s")
    answer = asking.result(SECONDS)
    assert answer.status != 200
    assert "cannot stop alpha" in answer.message
    assert "no answer within 5 s" in answer.message
    assert "has not returned" in blind.status()["gpu_observer"]
    nvml.heal()
    blind.until(lambda: blind.model("alpha")["state"] == "stopped")
    assert blind.status()["gpu_observer"] == "ok"


def test_the_daemon_ends_in_its_time(blind: Daemon) -> None:
    assert blind.request("GET", "/metrics").status == 200  # looks at the GPUs, and gives up
    began = time.monotonic()
    assert blind.stop() == 0
    print(f"ended after {time.monotonic() - began:.2f} s")
    assert time.monotonic() < began + SIGNALS_SECS
