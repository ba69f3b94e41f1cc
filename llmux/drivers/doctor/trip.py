"""The process of ``llmux doctor --cuda``: sends a throw-away CUDA process round, on each GPU.

Suspend, dump, restore, resume, and the bytes compared, each through the driver that parks engines.
Run by ``round_trip.py`` in a process of its own, which prints one line: a ``Trip`` per GPU as JSON.

A restored process is never killed with its CUDA state on the GPU, which has hung whole hosts
(cuda-checkpoint#53): whatever goes wrong it is suspended again first.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from llmux.drivers.criu.driver import Criu
from llmux.drivers.cuda.driver import CudaDriver
from llmux.drivers.cuda.tool import CudaCheckpointTool
from llmux.drivers.gpu import find_gpu_observer
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.bare import BareUnits, is_alive
from llmux.drivers.processes.users import SharedUser
from llmux.errors import DriverError, Unsupported
from llmux.image_ports import DumpSpec
from llmux.ports import DeviceCheckpointer, GpuObserver, LaunchSpec, UnitHandle

NAME: Final = "doctor-cuda"  # its model's, in messages of the drivers
SUBJECT: Final = Path(__file__).with_name("subject.py")
SIZE: Final = 64 << 20
STEP_SECS: Final = 60.0  # cuInit of 8 GPUs without persistence mode, a CUDA suspend: seconds
LEAVE_SECS: Final = 30.0  # for the suspend before the end
END_SECS: Final = 10.0  # from SIGTERM, where that suspend failed
KILL_SECS: Final = 15.0
SEEN_SECS: Final = 5.0  # until NVML no longer lists a process that was suspended
LOOK_EVERY: Final = 0.02  # files and NVML give no event

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """What ``round_trip.py`` asks for. ``criu``: its path. ``user``: whom engines run as."""

    gpus: int
    library: str
    tool: str | None
    criu: str
    user: str | None
    seconds: float
    size: int = SIZE


@dataclass(slots=True)
class Trip:
    """What one GPU's trip took, in seconds by step, and what it failed at. ``undumped``: why there
    was no dump and no restore."""

    gpu: int
    seconds: dict[str, float] = field(default_factory=dict)
    image_bytes: int = 0
    failed: str | None = None
    problem: str = ""
    remedy: str = ""
    undumped: str | None = None


class Subject:
    """The throw-away process on one GPU, and the trip that it makes."""

    def __init__(self, ask: Ask, trip: Trip, work: Path, end: float, cuda: DeviceCheckpointer):
        self._ask = ask
        self.trip = trip
        self._end = end
        self._cuda = cuda
        self._answers = work / "run"
        self._units = BareUnits(None)
        self._criu = Criu(
            self._units, ImageStore(str(work / "images")), str(work / "images"), criu_path=ask.criu
        )
        self._handle: UnitHandle | None = None
        self._on_gpu = False  # restored, and its CUDA state may be on the GPU
        self._step = "start"
        # An environment of its own Python could be closed to the engines' user.
        python = sys.executable if ask.user is None else os.path.realpath(sys.executable)
        self._spec = LaunchSpec(
            model=NAME,
            argv=(
                python,
                *("-I", "-c", SUBJECT.read_text(encoding="utf-8")),
                *(ask.library, str(self._answers), str(ask.size)),
            ),
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": str(trip.gpu),
            },
            user=SharedUser(ask.user, "").find(NAME) if ask.user else None,
            stdout=str(work / "log"),
            stderr=str(work / "log"),
            runtime_dir=str(self._answers),
        )

    async def travel(self, observer: GpuObserver) -> None:
        """Fills the trip; leaves nothing."""
        try:
            await self._go(observer)
        except DriverError as error:
            self._fail(error.message, error.hint)
        except (OSError, TimeoutError) as error:
            self._fail(str(error) or "not done in time", None)
        finally:
            await self._leave()

    def _fail(self, problem: str, remedy: str | None) -> None:
        self.trip.failed, self.trip.problem = self._step, problem
        self.trip.remedy = remedy or ""

    async def _go(self, observer: GpuObserver) -> None:
        limit = min(STEP_SECS, max(1.0, self._end - time.monotonic()))
        self._handle = await self._timed("start", self._units.start(self._spec, limit))
        await self._timed("start", self._answer("ready", "failed"))
        pids = [self._handle.pid]
        found = await self._timed("suspend", self._cuda.suspend(pids, limit))
        if not found:
            raise DriverError("suspend", "the process", "the driver sees no CUDA state in it")
        self._step = "release"
        await self._see_released(observer)
        if await self._can_dump():
            self._step = "dump"
            await self._criu.precheck(self._handle)
            spec = DumpSpec(launch=self._spec, identity={})
            image = await self._timed("dump", self._criu.dump(self._handle, spec, 2 * limit))
            self.trip.image_bytes = image.apparent_bytes
            restore = self._criu.restore(image, self._spec, 2 * limit)
            self._handle = await self._timed("restore", restore)
            await self._units.reap_restored(self._handle)
            await self._criu.confirm_restore(NAME)
        self._on_gpu = True
        await self._timed("resume", self._cuda.resume(pids, limit))
        self._step = "compare"
        os.kill(self._handle.pid, signal.SIGUSR1)
        await self._timed("compare", self._answer("equal", "differ"))

    async def _can_dump(self) -> bool:
        try:
            await self._criu.require(NAME)
        except Unsupported as error:
            self.trip.undumped = error.message
            return False
        return True

    async def _timed(self, step: str, work: Awaitable[T]) -> T:
        self._step = step
        began = time.monotonic()
        result = await work
        took = time.monotonic() - began
        self.trip.seconds[step] = round(self.trip.seconds.get(step, 0.0) + took, 3)
        return result

    async def _answer(self, good: str, bad: str) -> None:
        """Until the process has said either. DriverError, with what it said, when it is bad."""
        assert self._handle is not None
        async with asyncio.timeout(STEP_SECS):
            while not (self._answers / good).exists():
                if (self._answers / bad).exists():
                    text = (self._answers / bad).read_text() or "its bytes on the GPU are others"
                    raise DriverError("use", f"GPU {self.trip.gpu}", text)
                if not is_alive(self._handle):
                    raise DriverError("use", f"GPU {self.trip.gpu}", "the process has ended")
                await asyncio.sleep(LOOK_EVERY)

    async def _see_released(self, observer: GpuObserver) -> None:
        """NVML lists it no longer."""
        assert self._handle is not None
        end = time.monotonic() + SEEN_SECS
        while True:
            rows = await observer.processes()
            held = sum(row.used_bytes for row in rows if row.pid == self._handle.pid)
            if not held:
                return
            if time.monotonic() > end:
                text = f"{held >> 20} MiB are still held after the suspend"
                raise DriverError("free", f"GPU {self.trip.gpu}", text)
            await asyncio.sleep(LOOK_EVERY)

    async def _leave(self) -> None:
        if self._handle is None:
            return
        try:
            if self._on_gpu and is_alive(self._handle):
                await self._leave_gpu(self._handle)
            await self._units.kill(self._handle, KILL_SECS)
        except DriverError as error:
            if self.trip.failed is None:
                self._step = "end"
                self._fail(error.message, error.hint)

    async def _leave_gpu(self, handle: UnitHandle) -> None:
        try:
            await self._cuda.suspend([handle.pid], LEAVE_SECS)
        except DriverError as error:
            if self.trip.failed is None:
                self._step = "suspend again"
                self._fail(error.message, error.hint)
            # It gives back what it holds, if it can still.
            with suppress(ProcessLookupError):
                os.kill(handle.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECS):
                    while is_alive(handle):  # noqa: ASYNC110  # no child of ours: no event
                        await asyncio.sleep(LOOK_EVERY)


async def travel(ask: Ask, work: Path) -> list[Trip]:
    """One GPU after the other, so that each failure names its GPU."""
    end = time.monotonic() + ask.seconds
    cuda = CudaCheckpointTool(ask.tool) if ask.tool else CudaDriver(ask.library)
    observer = find_gpu_observer()
    trips = []
    try:
        for gpu in range(ask.gpus):
            trip = Trip(gpu)
            trips.append(trip)
            if time.monotonic() > end:
                trip.failed, trip.problem = "start", f"no time was left of {ask.seconds:g} s"
                continue
            directory = work / str(gpu)
            directory.mkdir(mode=0o711)
            (directory / "images").mkdir(mode=0o700)
            await Subject(ask, trip, directory, end, cuda).travel(observer)
    finally:
        await cuda.close()
    return trips


def main(asked: dict[str, Any]) -> None:
    # Not below /tmp, which may be a tmpfs without room; an image is trusted by who owns its path.
    parent = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108  # the directory in it is private
    with tempfile.TemporaryDirectory(prefix="llmux-doctor-", dir=parent) as name:
        os.chmod(name, 0o711)  # noqa: S103  # the engines' user passes through, and lists nothing
        trips = asyncio.run(travel(Ask(**asked), Path(name)))
    sys.stdout.write(json.dumps([asdict(trip) for trip in trips]) + "\n")


def summary(trips: Sequence[Trip]) -> str:
    """For people, one sentence per GPU."""
    return "; ".join(_sentence(trip) for trip in trips)


def _sentence(trip: Trip) -> str:
    steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in trip.seconds.items())
    if trip.failed is not None:
        done = f" (after {steps})" if steps else ""
        return f"GPU {trip.gpu}: {trip.failed} failed{done}: {trip.problem}"
    return f"GPU {trip.gpu}: bytes equal: {steps}"
