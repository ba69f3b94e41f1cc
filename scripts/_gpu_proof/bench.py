"""One engine of the proof and everything a row does to it, through llmux's own drivers."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _gpu_proof.client import Client, ProofError, same
from _gpu_proof.evidence import Evidence
from _gpu_proof.memory import Memory
from llmux.drivers.criu.driver import Criu
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.bare import BareUnits, is_alive
from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.image_ports import DumpSpec, Image
from llmux.ports import DeviceCheckpointer, LaunchSpec, UnitHandle

MODEL = "proof"
STEP_SECS = 60.0  # a park or a wake of the 4 GiB engine takes 4 to 10 s
STARTUP_SECS = 180.0  # importing torch from a cold disk takes 20 s, vLLM's start 70
KILL_SECS = 20.0


class OutOfBudgetError(Exception):
    """The time given with --budget is used up."""


class Budget:
    """``seconds`` for the whole run; None: no limit but each step's own."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def used_up(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def limit(self, most: float) -> float:
        """Seconds that the next step may take. OutOfBudgetError when nothing is left."""
        if self._end is None:
            return most
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.over()
        return min(most, left)

    def over(self) -> OutOfBudgetError:
        return OutOfBudgetError(f"the budget of {self._seconds:g} s is used up")


class Engine:
    """A process tree in a unit; after a CRIU restore the handle is a new one."""

    def __init__(
        self, argv: list[str], env: dict[str, str], work: Path, units: BareUnits, name: str
    ) -> None:
        runtime = work / f"run-{name}"
        self.client = Client(runtime / "proof.sock", MODEL)
        self.log = work / f"{name}.log"
        self.spec = LaunchSpec(
            model=MODEL,
            argv=(*argv, "--uds", str(self.client.uds)),
            env=env,
            user=None,
            stdout=str(self.log),
            stderr=str(self.log),
            runtime_dir=str(runtime),
        )
        self.units = units
        self.handle: UnitHandle | None = None

    @property
    def running(self) -> bool:
        return self.handle is not None and is_alive(self.handle)

    async def start(self, deadline: float) -> float:
        """Seconds from start to healthy."""
        begun = time.monotonic()
        self.client.uds.unlink(missing_ok=True)
        self.handle = await self.units.start(self.spec, deadline)
        await self.wait_healthy()
        return time.monotonic() - begun

    async def wait_healthy(self) -> None:
        """The caller has the deadline."""
        while not await asyncio.to_thread(self.client.healthy):
            if not self.running:
                raise ProofError(f"the engine ended: {self.last_words()}")
            await asyncio.sleep(0.05)

    async def pids(self) -> list[int]:
        return list(await self.units.pids(self.handle)) if self.handle else []

    def last_words(self) -> str:
        if not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-300:]

    async def kill(self) -> None:
        if self.handle is not None:
            await self.units.kill(self.handle, KILL_SECS)
            self.handle = None


@dataclass
class Bench:
    """What the rows of one engine share."""

    name: str
    engine: Engine
    memory: Memory
    baseline_mib: int
    cuda: DeviceCheckpointer
    criu: Criu
    store: ImageStore
    freezer: CgroupFreezer
    budget: Budget
    evidence: Evidence
    images: Path
    tolerance: float = 0.0
    pretended: bool = False
    reference: list[Any] = field(default_factory=list)
    image: Image | None = None
    cuda_pids: list[int] = field(default_factory=list)

    async def ensure_running(self) -> float | None:
        """A healthy engine; the seconds of its start when it had to be started."""
        if self.engine.running:
            return None
        limit = self.budget.limit(STARTUP_SECS)
        async with asyncio.timeout(limit):
            taken = await self.engine.start(limit)
            answers = await self.answers()
            if self.reference and not same(answers, self.reference, self.tolerance):
                raise ProofError("two cold starts do not answer the same: nothing can be compared")
            # Asked twice: the second answer comes from the prefix cache, as after a wake.
            self.reference = await self.answers()
        if not same(answers, self.reference, self.tolerance):
            raise ProofError("two greedy answers in a row differ: nothing can be compared")
        return taken

    async def answers(self) -> list[Any]:
        return await asyncio.to_thread(self.engine.client.answers)

    async def note(self, step: str) -> None:
        self.evidence.step(step, await self.engine.pids(), await self.memory.snapshot())

    # ---- the steps, each through the driver of the product --------------------------------------

    async def suspend(self) -> None:
        pids = await self.engine.pids()
        if not self.pretended:  # what is pretended takes no host memory
            used = max(0, await self.memory.used_mib() - self.baseline_mib) << 20
            await self.cuda.check_memory(pids, used)
        self.cuda_pids = list(await self.cuda.suspend(pids, self.budget.limit(STEP_SECS)))
        if not self.cuda_pids:
            raise ProofError("no process of the engine has CUDA state")

    async def resume(self) -> None:
        await self.cuda.resume(self.cuda_pids, self.budget.limit(STEP_SECS))

    async def freeze(self) -> None:
        assert self.engine.handle is not None
        await self.freezer.freeze(self.engine.handle, self.budget.limit(STEP_SECS))

    async def thaw(self) -> None:
        assert self.engine.handle is not None
        await self.freezer.thaw(self.engine.handle, self.budget.limit(STEP_SECS))

    async def dump(self) -> int:
        """Bytes of the image."""
        assert self.engine.handle is not None
        spec = DumpSpec(launch=self.engine.spec, identity={"engine": self.name})
        limit = self.budget.limit(2 * STEP_SECS)
        async with self.engine.units.reaping(await self.engine.pids()):
            self.image = await self.criu.dump(self.engine.handle, spec, limit)
        await self.engine.kill()  # nothing lives: removes the cgroup
        return self.image.apparent_bytes

    async def restore(self) -> None:
        assert self.image is not None
        limit = self.budget.limit(2 * STEP_SECS)
        self.engine.handle = await self.criu.restore(self.image, self.engine.spec, limit)
        await self.engine.units.reap_restored(self.engine.handle)
        await self.criu.confirm_restore(MODEL)

    async def require_checkpoint(self) -> None:
        """Raises Unsupported before anything was done when CRIU cannot work here."""
        await self.criu.require(MODEL)


def environment(gpu: int) -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # reproducible, as PyTorch's documentation asks
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # cuMem, as vLLM's sleep mode has
        "PYTHONDONTWRITEBYTECODE": "1",
    }
