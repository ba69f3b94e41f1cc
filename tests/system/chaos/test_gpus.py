"""Eight models on four GPUs, as vLLM, CUDA and NVML are on real ones: nothing of one model's memory
ever meets another's, and no resumed process is killed with its CUDA state on a GPU.

Short here; ``LLMUX_GPU_SWITCHES=500`` (and ``LLMUX_GPU_SEED``) for a long run.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from llmux_guest import GPU, LEDGER, STANDIN, LlmuxGuest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "parking"))

from nvml_lab import NVML, with_nvml
from parking_lab import ParkingLab, model

SWITCHES = int(os.environ.get("LLMUX_GPU_SWITCHES", "40"))
SEED = int(os.environ.get("LLMUX_GPU_SEED", "7"))
GIB = 1024**3

pytestmark = [pytest.mark.system, pytest.mark.timeout(240 + 4 * SWITCHES)]

# name → how it is parked, share of each GPU, GPUs
MODELS: dict[str, tuple[str, float, Any]] = {
    "a": ("discard+checkpoint", 0.45, 1),
    "b": ("retain+cuda_suspend", 0.45, 1),
    "c": ("offload+keep_running", 0.4, 1),
    "d": ("discard+cuda_suspend", 0.9, 1),
    "e": ("offload+checkpoint", 0.9, 1),
    "f": ("discard+keep_running", 0.4, 1),
    "g": ("retain+stop", 0.9, 1),
    "h": ("offload+keep_running", 0.45, [2, 3]),
}


def configured(name: str, way: str, share: float, gpus: Any) -> dict[str, Any]:
    env = {
        "STANDIN_CAPACITY_GIB": "8",
        "STANDIN_WEIGHTS_GIB": "1",
        "STANDIN_CONTEXT_GIB": "0.1",
        "STANDIN_DEVICE_CHECKS": "1",
        "STANDIN_PROFILE_SECS": "0.1",
        "STANDIN_FAULTS": f"{GPU}/{name}.faults",
    }
    ranks = len(gpus) if isinstance(gpus, list) else 1
    args = ["--tensor-parallel-size", str(ranks)] if ranks > 1 else []
    return model(way, env=env, gpu_memory=share, gpus=gpus, extra_args=args)


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = with_nvml(llmux)
    yield lab
    lab.end()


def test_no_model_meets_the_memory_of_another(lab: ParkingLab) -> None:
    lab.end()
    lab.run(["python3", str(pathlib.Path(STANDIN).with_name("ledger.py")), "init", LEDGER,
             "--capacity-gib", "8", "--gpus", "4"])  # fmt: skip
    lab.llmux.guest.write(f"{NVML}/late", "300\n")  # memory is back later than a process has ended
    lab.llmux.guest.write(f"{NVML}/foreign", f"3 1 {GIB // 20}\n")
    models = {name: configured(name, *facts) for name, facts in MODELS.items()}
    lab.llmux.configure(
        models,
        engine_user="root",
        policy={"policy_type": "fifo", "min_active_secs": 0, "backoff_secs": 0.2},
    )
    lab.run(["systemctl", "start", "llmux"], timeout=180)
    done = lab.run(
        ["python3", "/srv/llmux/tests/system/chaos/gpus.py", str(SWITCHES), str(SEED)],
        check=False, timeout=120 + 4 * SWITCHES,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, f"{done.stderr}\n{lab.llmux.journal(lines=200)}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["switches"] >= SWITCHES, report
    assert report["wrong"] == [], lab.llmux.journal(lines=300)
    assert report["out_of_memory"] == 0, lab.llmux.journal(lines=300)
    assert report["hosts_hung"] == [], lab.llmux.journal(lines=300)
