"""GPUs that are divided by MIG: said at the start, and never given to a model in parts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmux.config.load import load_config
from llmux.config.schema import ModelConfig
from llmux.drivers.gpu import NvmlObserver
from llmux.errors import ConfigError, LlmuxError
from llmux.runtime.engines.launch import engine_environment, require_whole_gpus
from llmux.runtime.host import Places

sys.path[:0] = [str(Path(__file__).parents[2] / name) for name in ("fake_nvml", "standin")]

# ruff: noqa: E402  # the folders have to be on the path first
from fake_nvml import FakeNvml
from ledger import GIB, Ledger, find_start_time

DEVICE = "MIG-f3ae1c6b-0000-5c1c-9f4b-1d1c3f1c9c11"


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    yield process.pid
    process.kill()
    process.wait()


def test_a_divided_gpu_is_named_at_the_start(
    tmp_path: Path, child: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its memory is seen as a whole; what a process holds of it is not."""
    ledger = Ledger(str(tmp_path / "ledger.json"), default_capacity_gib=80)
    ledger.init(gpus=2)
    fake = FakeNvml(tmp_path / "nvml", ledger.path)
    fake.mig(1)
    for gpu in range(2):
        ledger.allocate(gpu, child, find_start_time(child) or 0, "a", {"kv": 8 * GIB})
    observer = NvmlObserver(str(fake.library))
    assert "GPU 1 is divided by MIG" in caplog.text
    assert "nvidia-smi -i 1 -mig 0" in caplog.text
    assert "GPU 0" not in caplog.text

    async def look() -> None:
        assert await observer.totals() == {0: 80 * GIB, 1: 80 * GIB}
        assert await observer.used() == {0: 8 * GIB, 1: 8 * GIB}
        assert [process.gpu for process in await observer.processes()] == [0]
        await observer.close()

    asyncio.run(look())


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        (f"gpus: [{DEVICE}]", "models.a.gpus[0]"),
        (f"env: {{CUDA_VISIBLE_DEVICES: {DEVICE}}}", "models.a.env.CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_mig_device_in_the_configuration_is_refused(
    tmp_path: Path, lines: str, place: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"models:\n  a:\n    model_path: org/a\n    {lines}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    (problem,) = caught.value.problems
    assert problem.path == place
    assert "nvidia-smi -mig 0" in problem.message


def test_a_mig_device_of_the_unit_is_refused_at_the_start_of_an_engine() -> None:
    config = ModelConfig("a", "org/a")
    given = {"PATH": "/bin", "HOME": "/", "CUDA_VISIBLE_DEVICES": f"GPU-1,{DEVICE}"}
    places = Places(runtime="/r", environment=given)
    require_whole_gpus(config, engine_environment(config, (0,), places))
    with pytest.raises(LlmuxError, match="names a MIG device"):
        require_whole_gpus(config, engine_environment(config, (1,), places))
