"""DeviceCheckpointer: the rules that the driver API, the tool and the in-memory twin keep alike."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_libcuda"))

from fake_cuda import COMPILER, FakeCuda

from llmux.drivers.cuda.calls import ProcessTable
from llmux.drivers.cuda.driver import CudaDriver
from llmux.drivers.cuda.tool import CudaCheckpointTool
from llmux.errors import DriverError
from llmux.ports import DeviceCheckpointer, LaunchSpec
from tests.twins.gpu import MemoryCuda
from tests.twins.units import MemoryUnits
from tests.twins.world import World

LONG = 30.0
REAL = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the fake libcuda.so.1")
KINDS = ["memory", pytest.param("library", marks=REAL), pytest.param("tool", marks=REAL)]


@dataclass
class Rig:
    cuda: DeviceCheckpointer
    pid: int  # a process with CUDA state
    absent: int  # no process


@asynccontextmanager
async def rig_of(kind: str, directory: Path) -> AsyncIterator[Rig]:
    cuda: DeviceCheckpointer
    if kind == "memory":
        world = World()
        spec = LaunchSpec("m", ("vllm",), {}, None, "/out", "/err", str(directory))
        handle = await MemoryUnits(world).start(spec, LONG)
        cuda, pid = MemoryCuda(world), handle.pid
    else:
        fake, pid = FakeCuda(directory), 101
        fake.add(pid)
        processes = ProcessTable(fake.proc)
        if kind == "library":
            cuda = CudaDriver(str(fake.library), processes=processes)
        else:
            cuda = CudaCheckpointTool(str(fake.tool), processes=processes)
    try:
        yield Rig(cuda, pid, 4_000_000)
    finally:
        await cuda.close()


@pytest.mark.parametrize("kind", KINDS)
class TestDeviceCheckpointer:
    def test_goes_and_comes_back_and_twice_is_as_once(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with rig_of(kind, tmp_path) as rig:
                for _ in range(2):
                    for _ in range(2):
                        assert list(await rig.cuda.suspend([rig.pid], LONG)) == [rig.pid]
                    for _ in range(2):
                        await rig.cuda.resume([rig.pid], LONG)

        asyncio.run(body())

    def test_it_says_what_a_suspend_would_take(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with rig_of(kind, tmp_path) as rig:
                assert list(await rig.cuda.suspendable([rig.pid], LONG)) == [rig.pid]
                await rig.cuda.suspend([rig.pid], LONG)
                assert list(await rig.cuda.suspendable([rig.pid], LONG)) == [rig.pid]

        asyncio.run(body())

    def test_a_process_that_is_gone_cannot_be_resumed(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with rig_of(kind, tmp_path) as rig:
                with pytest.raises(DriverError):
                    await rig.cuda.resume([rig.absent], LONG)

        asyncio.run(body())

    def test_a_little_memory_is_always_there(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with rig_of(kind, tmp_path) as rig:
                await rig.cuda.check_memory([rig.pid], 1 << 20)

        asyncio.run(body())
