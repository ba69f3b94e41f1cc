"""What a contract test stands on: one driver, real or twin, and a way to make things happen to it.

The systemd rig exists only inside a guest (scripts/lab), where LLMUX_IN_GUEST=1 is set by
tests/system/test_systemd_units.py; outside nothing is skipped, the rig is simply not among the
parameters.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmux.drivers.engine.vllm import VllmEngine
from llmux.drivers.processes.children import DirectUnits
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.ports import Engine, Freezer, LaunchSpec, UnitHandle, UnitManager
from llmux.protocol import Address
from tests.twins.engine import MemoryEngine
from tests.twins.units import MemoryFreezer, MemoryUnits
from tests.twins.world import World

IN_GUEST = os.environ.get("LLMUX_IN_GUEST") == "1"
UNIT_RIGS = ["memory", "direct", *(["systemd"] if IN_GUEST else [])]
FREEZER_RIGS = ["memory", *(["systemd"] if IN_GUEST else [])]
ENGINE_RIGS = ["memory", "vllm"]

STANDIN = Path(__file__).resolve().parents[1] / "standin"
SLEEPER = ("/bin/sleep", "1000")
DEADLINE = 10.0  # generous: nothing here takes 0.1 s on an idle machine


@dataclass
class UnitsRig:
    kind: str
    units: UnitManager
    freezer: Freezer
    directory: Path
    world: World | None = None

    @property
    def real(self) -> bool:
        return self.world is None

    def spec(self, model: str = "alpha", argv: tuple[str, ...] = SLEEPER) -> LaunchSpec:
        files = self.directory / model
        files.mkdir(exist_ok=True)
        return LaunchSpec(
            model=model,
            argv=argv,
            env={"PATH": "/usr/bin:/bin"},
            user=None,
            stdout=str(files / "stdout.log"),
            stderr=str(files / "stderr.log"),
            runtime_dir=str(self.directory / f"{model}.run"),
        )


@asynccontextmanager
async def units_rig(kind: str, directory: Path) -> AsyncIterator[UnitsRig]:
    """A unit manager and the freezer that goes with it; every unit is killed at the end."""
    if kind == "memory":
        world = World()
        yield UnitsRig(kind, MemoryUnits(world), MemoryFreezer(world), directory, world)
        return
    units: UnitManager
    if kind == "direct":
        units = DirectUnits()
    else:
        from llmux.drivers.systemd.units import SystemdUnits

        units = SystemdUnits()
    freezer = CgroupFreezer()
    try:
        yield UnitsRig(kind, units, freezer, directory)
    finally:
        for handle in await units.observe():
            await units.kill(handle, DEADLINE)
        await units.close()
        await freezer.close()


class Exits:
    """Collects the calls of watch()."""

    def __init__(self) -> None:
        self.seen: list[tuple[UnitHandle, str]] = []
        self._told = asyncio.Event()

    def __call__(self, handle: UnitHandle, description: str) -> None:
        self.seen.append((handle, description))
        self._told.set()

    async def next(self) -> str:
        async with asyncio.timeout(DEADLINE):
            await self._told.wait()
        return self.seen[-1][1]


async def turns(count: int = 5) -> None:
    """Let the loop turn: what was to be called soon has been called."""
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass
class EngineRig:
    kind: str
    engine: Engine
    units: UnitManager
    directory: Path
    world: World | None = None
    faults: dict[str, Path] = field(default_factory=dict)

    def address(self, model: str = "alpha") -> Address:
        return Address(uds=str(self.directory / f"{model}.sock"))

    async def start(self, model: str = "alpha", *flags: str, share: float = 0.9) -> Address:
        """A healthy engine."""
        address = self.address(model)
        argv = (
            sys.executable,
            str(STANDIN / "standin.py"),
            "serve",
            model,
            "--served-model-name",
            model,
            "--uds",
            str(address.uds),
            "--enable-sleep-mode",
            f"--gpu-memory-utilization={share}",
            "--standin-ledger",
            str(self.directory / "ledger.json"),
            *flags,
        )
        spec = LaunchSpec(
            model=model,
            argv=argv,
            env={"PATH": "/usr/bin:/bin", "VLLM_SERVER_DEV_MODE": "1"},
            user=None,
            stdout=str(self.directory / f"{model}.out"),
            stderr=str(self.directory / f"{model}.err"),
            runtime_dir=str(self.directory / f"{model}.run"),
        )
        await self.units.start(spec, DEADLINE)
        await self.engine.wait_healthy(address, DEADLINE)
        return address


def make_ledger(path: Path) -> None:
    command = [sys.executable, str(STANDIN / "ledger.py"), "init", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@asynccontextmanager
async def engine_rig(kind: str, directory: Path) -> AsyncIterator[EngineRig]:
    """The engine driver on the stand-in engine, or its twin on a pretended one."""
    if kind == "memory":
        world = World()
        yield EngineRig(kind, MemoryEngine(world), MemoryUnits(world), directory, world)
        return
    make_ledger(directory / "ledger.json")
    units = DirectUnits()
    try:
        yield EngineRig(kind, VllmEngine(), units, directory)
    finally:
        await units.close()
