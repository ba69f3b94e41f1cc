"""GPU memory as the proof sees it: llmux's NVML driver, nvidia-smi, or the pretended ledger."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path
from typing import Protocol

from llmux.drivers.gpu import NvmlObserver
from llmux.drivers.processes.run import run
from llmux.errors import DriverError, Unsupported

MIB = 1 << 20


class Memory(Protocol):
    name: str

    async def used_mib(self) -> int:
        """Used memory of the whole GPU."""

    async def describe(self) -> str: ...

    async def snapshot(self) -> dict[str, object]:
        """What can be seen now, for the evidence."""


class Nvml(NvmlObserver):
    """llmux's observer, and the device-wide figure: in a container NVML may show no process."""

    name = "NVML"

    def __init__(self, gpu: int) -> None:
        super().__init__()
        self._gpu = gpu

    async def used_mib(self) -> int:
        return (await self.used())[self._gpu] // MIB

    async def describe(self) -> str:
        def look() -> str:
            name, driver = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
            self._nvml.nvmlDeviceGetName(self._device(self._gpu), name, 96)
            self._nvml.nvmlSystemGetDriverVersion(driver, 96)
            return f"{name.value.decode()}, driver {driver.value.decode()}"

        return await self._in_thread(look)

    async def snapshot(self) -> dict[str, object]:
        found = [f"{p.pid}: {p.used_bytes}" for p in await self.processes() if p.gpu == self._gpu]
        return {"used_mib": await self.used_mib(), "processes": found}


class Smi:
    """nvidia-smi, where NVML cannot be loaded."""

    name = "nvidia-smi"

    def __init__(self, gpu: int) -> None:
        self._gpu = gpu

    async def _query(self, what: str) -> str:
        argv = ["nvidia-smi", "-i", str(self._gpu), f"--query-gpu={what}"]
        done = await run([*argv, "--format=csv,noheader,nounits"], 30.0)
        if done.code != 0:
            raise Unsupported("run", "nvidia-smi", done.excerpt)
        return done.stdout.strip()

    async def used_mib(self) -> int:
        return int(await self._query("memory.used"))

    async def describe(self) -> str:
        name, _, driver = (await self._query("name,driver_version")).partition(",")
        return f"{name.strip()}, driver {driver.strip()}"

    async def snapshot(self) -> dict[str, object]:
        return {"used_mib": await self.used_mib()}


class PretendedMemory:
    """The ledger of pretended engines; what is checkpointed holds nothing."""

    name = "ledger (pretended)"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def used_mib(self) -> int:
        return self._sum()

    def _sum(self) -> int:
        total = 0
        for path in (self._directory / "ledger").glob("*"):
            if path.suffix or not Path(f"/proc/{path.name}").exists():
                continue
            if (self._directory / "procs" / path.name).read_text().strip() != "2":
                total += int(path.read_text())
        return total // MIB

    async def describe(self) -> str:
        return "no GPU: pretended"

    async def snapshot(self) -> dict[str, object]:
        return {"used_mib": await self.used_mib()}


async def find_memory(gpu: int) -> Memory:
    """Raises Unsupported with both reasons when neither NVML nor nvidia-smi works."""
    try:
        nvml = await asyncio.to_thread(Nvml, gpu)
        await nvml.used_mib()
        return nvml
    except DriverError as first:
        smi = Smi(gpu)
        try:
            await smi.used_mib()
        except DriverError as second:
            raise Unsupported("observe", f"GPU {gpu}", f"no NVML: {first}; {second}") from second
        return smi
