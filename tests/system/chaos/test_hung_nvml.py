"""An NVML whose calls never return (a GPU fell off the bus): engines end, and llmux does."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Iterator

import pytest
from llmux_guest import SUPERVISOR, LlmuxGuest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "parking"))

from nvml_lab import go_on, stand_still, with_nvml
from parking_lab import ParkingLab, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

STOP_SECS = 30.0  # TimeoutStopSec of llmux.service
# Orders the unload and waits for the engine's end; prints seconds to that, status and words.
UNLOAD = """
import json, os, subprocess, sys, time
began = time.monotonic()
cli = subprocess.Popen(["llmux", "unload", "alpha"], stdout=-1, stderr=subprocess.STDOUT, text=True)
while os.path.exists("/proc/PID"):
    time.sleep(0.02)
ended = time.monotonic() - began
said, _ = cli.communicate()
print(json.dumps([ended, cli.returncode, said]))
"""


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = with_nvml(llmux)
    yield lab
    go_on(lab)
    lab.end()


def test_an_engine_is_ended_and_so_is_the_service(lab: ParkingLab) -> None:
    lab.begin({"alpha": small("offload+keep_running"), "beta": small("offload+keep_running")})
    lab.good("alpha")
    (pid, *_) = lab.llmux.pids()["alpha"]
    stand_still(lab)

    done = lab.run(["python3", "-c", UNLOAD.replace("PID", str(pid))], timeout=120)
    seconds, status, said = json.loads(done.stdout.splitlines()[-1])
    print(f"unload: the engine ended after {seconds:.2f} s, status {status}: {said}")
    assert seconds < 10, "its signals waited for NVML"
    assert status != 0
    assert "is stopped" not in said
    assert lab.llmux.status()["models"]["alpha"]["state"] == "failed"

    began = time.monotonic()
    lab.run(["systemctl", "stop", SUPERVISOR], timeout=120)
    took = time.monotonic() - began
    print(f"systemctl stop: {took:.2f} s")
    assert took < STOP_SECS
    assert lab.llmux.show(SUPERVISOR, "Result") == "success", "systemd had to kill it"

    go_on(lab)
    lab.run(["systemctl", "start", SUPERVISOR], timeout=120)
    lab.run(["llmux", "load", "alpha"])  # what failed before a restart backs off after it
    lab.good("alpha", timeout=60)
