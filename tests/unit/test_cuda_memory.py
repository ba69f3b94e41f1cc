"""Whether host memory can take what leaves the GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from llmux.drivers.cuda.driver import CudaDriver
from llmux.drivers.cuda.host_memory import GIB, HostMemory, required_host_bytes
from llmux.drivers.memory import available_bytes
from llmux.errors import CheckpointFailed


@pytest.fixture
def host(tmp_path: Path) -> HostMemory:
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "cgroup/llmux.slice/a.scope/engine").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text("0::/llmux.slice/a.scope/engine\n")
    return HostMemory(tmp_path / "proc", tmp_path / "cgroup", lambda: 64 * GIB)


def limit(tmp_path: Path, group: str, most: str, used: int, cache: int = 0) -> None:
    directory = tmp_path / "cgroup" / group
    (directory / "memory.max").write_text(most + "\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 0\n")


def test_needs_what_is_on_the_gpu_and_a_spare() -> None:
    assert required_host_bytes(100 * GIB) == 103 * GIB
    assert required_host_bytes(0) == GIB


def test_available_memory_is_the_kernels_own_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    names = ("MemTotal", "MemFree", "Buffers", "Cached", "Shmem", "Active", "Inactive")
    lines = [f"{name}: 4096 kB\n" for name in names]
    (tmp_path / "meminfo").write_text("".join(lines) + "MemAvailable:    2048 kB\n")
    assert available_bytes() == 2 << 20


def test_fits(host: HostMemory) -> None:
    assert host.shortage([7], 60 * GIB) is None


def test_too_little_says_that_the_kv_cache_moves_too(host: HostMemory) -> None:
    cuda = CudaDriver(memory=host)
    with pytest.raises(CheckpointFailed) as caught:
        asyncio.run(cuda.check_memory([7], 127 * GIB))
    text = str(caught.value)
    assert "cannot suspend process 7: 130.5 GiB of host memory are needed" in text
    assert "weights that were retained *and* the KV cache" in text
    assert "MemAvailable is 64.0 GiB" in text
    assert "discard or offload" in text


def test_a_memory_limit_above_the_process_counts_less_its_page_cache(
    host: HostMemory, tmp_path: Path
) -> None:
    limit(tmp_path, "llmux.slice/a.scope/engine", "max", 0)
    limit(tmp_path, "llmux.slice", str(40 * GIB), 20 * GIB, cache=8 * GIB)
    assert host.headroom(7) == (28 * GIB, "llmux.slice")
    assert host.shortage([7], 20 * GIB) is None
    problem = host.shortage([7], 30 * GIB)
    assert problem is not None
    assert "MemoryMax of llmux.slice leaves 28.0 GiB" in problem


def test_cgroup_v1_and_vanished_processes_set_no_limit(host: HostMemory, tmp_path: Path) -> None:
    (tmp_path / "proc/7/cgroup").write_text("4:memory:/x\n")
    assert host.headroom(7) is None
    assert host.headroom(8) is None
