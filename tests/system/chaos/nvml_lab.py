"""llmux in a guest that sees its GPUs through the fake NVML library, which takes orders."""

from __future__ import annotations

import pathlib
import sys
import tempfile

from llmux_guest import LEDGER, SUPERVISOR, LlmuxGuest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "parking"))
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "fake_nvml"))

import fake_nvml
from parking_lab import ParkingLab

NVML = "/var/tmp/nvml"
CALLS = ("processes", "memory")


def with_nvml(llmux: LlmuxGuest) -> ParkingLab:
    lab = ParkingLab(llmux)
    lab.run(["install", "-d", "-m", "0777", NVML, f"{NVML}/faults"])
    with tempfile.TemporaryDirectory() as directory:
        library = fake_nvml.FakeNvml(pathlib.Path(directory), LEDGER).library.read_bytes()
    llmux.guest.write(f"{NVML}/libnvidia-ml.so.1", library, mode=0o755)
    llmux.guest.write(f"{NVML}/ledger", f"{LEDGER}\n")
    fifos = [f"{NVML}/faults/{call}.fifo" for call in CALLS]
    lab.run(["rm", "-f", *fifos])  # of another module's tests in the same guest
    lab.run(["mkfifo", *fifos])
    observer = f"LLMUX_GPU_LEDGER= LLMUX_LIBNVML={NVML}/libnvidia-ml.so.1"
    llmux.drop_in(SUPERVISOR, "nvml", f"[Service]\nEnvironment={observer}\n")
    return lab


def stand_still(lab: ParkingLab) -> None:
    """No call of NVML returns any more."""
    for call in CALLS:
        lab.llmux.guest.write(f"{NVML}/faults/{call}", "hang\n")


def go_on(lab: ParkingLab) -> None:
    lab.run(
        ["sh", "-c", f"cd {NVML}/faults; rm -f {' '.join(CALLS)}; for f in *.fifo; do : <>$f; done"]
    )


__all__ = ["NVML", "go_on", "stand_still", "with_nvml"]
