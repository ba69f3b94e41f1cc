"""GPU memory by process: from NVML, from the ledger of simulated GPUs, or unknown."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from llmux.drivers.processes.process import read_stat
from llmux.errors import DriverError, DriverTimeout, Unsupported
from llmux.ports import GpuObserver, GpuProcess

log = logging.getLogger(__name__)

LEDGER_VARIABLE: Final = "LLMUX_GPU_LEDGER"
LIBRARY_VARIABLE: Final = "LLMUX_LIBNVML"
LIBRARY: Final = "libnvidia-ml.so.1"
_NOT_AVAILABLE: Final = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE, e.g. under WSL
_SUCCESS: Final = 0
_TICK: Final = 1  # of the kernel's clock
_INSUFFICIENT_SIZE: Final = 7
# Seconds. A look takes milliseconds; what takes longer than this is in a driver that hangs.
CALL_SECS: Final = 5.0
START_SECS: Final = 15.0  # nvmlInit without persistence mode initialises every GPU
CLOSE_SECS: Final = 1.0
HANGS: Final = "does `nvidia-smi` answer? a GPU that fell off the bus needs a reboot"

_T = TypeVar("_T")


class NoGpu:
    """Nothing is known; releases are taken on trust."""

    @property
    def available(self) -> bool:
        return False

    @property
    def blind(self) -> str | None:
        return None

    async def gpu_count(self) -> int:
        return 0

    async def processes(self) -> Sequence[GpuProcess]:
        return ()

    async def totals(self) -> Mapping[int, int]:
        return {}

    async def used(self) -> Mapping[int, int]:
        return {}

    async def close(self) -> None:
        """Nothing is held."""


class _ProcessInfo(ctypes.Structure):
    # nvmlProcessInfo_t, version 2 and 3 of the call
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _Memory2(ctypes.Structure):
    # nvmlMemory_v2_t
    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


@dataclass(frozen=True, slots=True)
class _Room:
    total: int
    used: int


class _Caller:
    """One thread of our own for calls that may never return: it is abandoned then, and until that
    call returns every other fails at once. A daemon, so that it never keeps the process."""

    def __init__(self, target: str, call_secs: float = CALL_SECS) -> None:
        self._target = target
        self._call_secs = call_secs
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._hangs_since: float | None = None
        threading.Thread(target=self._work, name="llmux-nvml", daemon=True).start()

    @property
    def blind(self) -> str | None:
        """Why calls fail now; None when they do not."""
        if self._hangs_since is None:
            return None
        return f"a call has not returned for {time.monotonic() - self._hangs_since:.0f} s"

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        self._calls.put((function, future))
        return future

    async def call(self, function: Callable[[], _T], deadline: float | None = None) -> _T:
        """Raises DriverTimeout at the deadline, DriverError while a former call hangs."""
        if (blind := self.blind) is not None:
            raise DriverError("observe", self._target, blind, hint=HANGS)
        deadline = self._call_secs if deadline is None else deadline
        future = self.submit(function)
        try:
            async with asyncio.timeout(deadline):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            self._late(future)
            text = f"no answer within {deadline:g} s"
            raise DriverTimeout("observe", self._target, text, hint=HANGS) from None

    def wait(self, function: Callable[[], _T], deadline: float) -> _T:
        """The same without an event loop. Raises TimeoutError."""
        future = self.submit(function)
        try:
            return future.result(deadline)
        except TimeoutError:
            self._late(future)
            raise

    def end(self) -> None:
        """No call comes any more: the thread ends."""
        self._calls.put(None)

    def _late(self, future: Future[Any]) -> None:
        log.error("NVML hangs: GPU memory cannot be seen (%s)", HANGS)
        self._hangs_since = time.monotonic()
        # cancelled by wrap_future; a marker behind it says when the thread is free again
        self.submit(lambda: None).add_done_callback(self._back)

    def _back(self, _: object) -> None:
        self._hangs_since = None
        log.warning("NVML answers again")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  # it belongs to the caller
                future.set_exception(error)


class NvmlObserver:
    """NVML by ctypes, in a thread of its own: its calls take milliseconds, the first a second, and
    on a broken GPU for ever.

    Raises Unsupported when there is no libnvidia-ml.so.1 or it does not start. Pids are the host's.
    """

    def __init__(self, library: str = LIBRARY, *, call_secs: float = CALL_SECS) -> None:
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError as error:
            raise Unsupported("observe", "the GPUs", str(error)) from error
        self._caller = _Caller("the GPUs", call_secs)
        try:
            with suppress(TimeoutError):  # then it is blind until the call returns
                self._caller.wait(self._start, START_SECS)
        except BaseException as error:
            self._caller.end()
            if isinstance(error, AttributeError):  # a library of that name, and not NVIDIA's
                raise Unsupported("observe", "the GPUs", f"{library}: {error}") from error
            raise

    def _start(self) -> None:
        self._check(self._nvml.nvmlInit_v2(), "nvmlInit")
        for gpu in filter(self._is_divided, range(self._count())):
            log.warning(
                "GPU %d is divided by MIG: llmux counts it as one GPU, does not see what engines"
                " hold of it, and cannot suspend their CUDA state (next step: `nvidia-smi -i %d"
                " -mig 0`)",
                gpu,
                gpu,
            )

    def _is_divided(self, gpu: int) -> bool:
        """Whether MIG is on. GPUs without it, and old drivers, say that they do not know."""
        ask = getattr(self._nvml, "nvmlDeviceGetMigMode", None)
        if ask is None:
            return False
        now, after_reset = ctypes.c_uint(), ctypes.c_uint()
        code = ask(self._device(gpu), ctypes.byref(now), ctypes.byref(after_reset))
        return code == _SUCCESS and now.value == 1

    @property
    def available(self) -> bool:
        return True

    @property
    def blind(self) -> str | None:
        return self._caller.blind

    async def gpu_count(self) -> int:
        return await self._in_thread(self._count)

    async def processes(self) -> Sequence[GpuProcess]:
        def look() -> list[GpuProcess]:
            return [process for gpu in range(self._count()) for process in self._processes_of(gpu)]

        return await self._in_thread(look)

    async def totals(self) -> Mapping[int, int]:
        return await self._in_thread(
            lambda: {gpu: self._memory(gpu).total for gpu in range(self._count())}
        )

    async def used(self) -> Mapping[int, int]:
        return await self._in_thread(
            lambda: {gpu: self._memory(gpu).used for gpu in range(self._count())}
        )

    async def close(self) -> None:
        with suppress(DriverError):
            await self._caller.call(lambda: self._nvml.nvmlShutdown(), CLOSE_SECS)

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await self._caller.call(function)

    def _count(self) -> int:
        count = ctypes.c_uint()
        code = self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        self._check(code, "nvmlDeviceGetCount")
        return count.value

    def _device(self, gpu: int) -> ctypes.c_void_p:
        device = ctypes.c_void_p()
        code = self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(gpu), ctypes.byref(device))
        self._check(code, f"nvmlDeviceGetHandleByIndex({gpu})")
        return device

    def _memory(self, gpu: int) -> _Room:
        """As CUDA, and so vLLM, counts: without what the driver keeps for itself (615 MiB of an
        H200), which the first version of the call shows as used."""
        memory = _Memory2()
        memory.version = ctypes.sizeof(memory) | 2 << 24
        ask = getattr(self._nvml, "nvmlDeviceGetMemoryInfo_v2", None)
        if ask is not None and ask(self._device(gpu), ctypes.byref(memory)) == _SUCCESS:
            return _Room(memory.total - memory.reserved, memory.used)
        old = _Memory()  # drivers before 510
        code = self._nvml.nvmlDeviceGetMemoryInfo(self._device(gpu), ctypes.byref(old))
        self._check(code, "nvmlDeviceGetMemoryInfo")
        return _Room(old.total, old.used)

    def _processes_of(self, gpu: int) -> list[GpuProcess]:
        call = getattr(self._nvml, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        if call is None:  # drivers before 510
            call = self._nvml.nvmlDeviceGetComputeRunningProcesses_v2
        device = self._device(gpu)
        room = 64
        while True:
            table = (_ProcessInfo * room)()
            count = ctypes.c_uint(room)
            code = call(device, ctypes.byref(count), table)
            if code != _INSUFFICIENT_SIZE:
                break
            room = max(count.value, room) * 2
        self._check(code, "nvmlDeviceGetComputeRunningProcesses")
        rows = [(int(row.pid), int(row.used)) for row in table[: count.value]]
        unknown = sum(used == _NOT_AVAILABLE for _, used in rows)
        if not unknown:
            return [GpuProcess(gpu, pid, used) for pid, used in rows]
        known = sum(used for _, used in rows if used != _NOT_AVAILABLE)
        part = max(0, self._memory(gpu).used - known) // unknown
        return [
            GpuProcess(gpu, pid, part if used == _NOT_AVAILABLE else used) for pid, used in rows
        ]

    def _check(self, code: int, call: str) -> None:
        if code == _SUCCESS:
            return
        describe = self._nvml.nvmlErrorString
        describe.restype = ctypes.c_char_p
        text = (describe(ctypes.c_int(code)) or b"?").decode(errors="replace")
        raise Unsupported("observe", "the GPUs", f"{call}: {text}", hint="does nvidia-smi work?")


class LedgerObserver:
    """The JSON file that the tests' stand-in engines allocate from; see tests/standin/ledger.py.

    A row counts while its process lives with the start time that it was made with. That is read
    within the engine; a restored one has a time namespace, and the rounding of its offset may
    make a tick of difference.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def available(self) -> bool:
        return True

    @property
    def blind(self) -> str | None:
        return None

    async def gpu_count(self) -> int:
        return len(self._read()["gpus"])

    async def processes(self) -> Sequence[GpuProcess]:
        held: dict[tuple[int, int], int] = {}
        for row in self._read()["rows"]:
            stat = read_stat(int(row["pid"]))
            if stat is None or stat[2] in "ZX":
                continue
            if abs(stat[1] - int(row["start"])) <= _TICK:
                key = int(row["gpu"]), int(row["pid"])
                held[key] = held.get(key, 0) + int(row["bytes"])
        return [GpuProcess(gpu, pid, used) for (gpu, pid), used in sorted(held.items())]

    async def totals(self) -> Mapping[int, int]:
        gpus = self._read()["gpus"]
        return {int(gpu): int(entry["capacity"]) for gpu, entry in sorted(gpus.items())}

    async def used(self) -> Mapping[int, int]:
        found = dict.fromkeys(await self.totals(), 0)
        for process in await self.processes():
            found[process.gpu] = found.get(process.gpu, 0) + process.used_bytes
        return found

    async def close(self) -> None:
        """Nothing is held."""

    def _read(self) -> dict[str, Any]:
        try:
            with open(self._path, encoding="utf-8") as file:
                text = file.read()
            data = json.loads(text) if text.strip() else {}
            return {"gpus": dict(data.get("gpus", {})), "rows": list(data.get("rows", []))}
        except FileNotFoundError:
            return {"gpus": {}, "rows": []}
        except (OSError, ValueError, AttributeError) as error:
            raise DriverError("read", f"the GPU ledger {self._path}", str(error)) from error


def nvml_is_here() -> bool:
    """Whether ``find_gpu_observer`` would find it. Blocks for START_SECS at most."""
    return find_gpu_observer().available


def find_gpu_observer() -> GpuObserver:
    """The ledger that $LLMUX_GPU_LEDGER names, else NVML ($LLMUX_LIBNVML: a library of another name
    or place), else nothing."""
    if path := os.environ.get(LEDGER_VARIABLE):
        return LedgerObserver(path)
    try:
        return NvmlObserver(os.environ.get(LIBRARY_VARIABLE, LIBRARY))
    except Unsupported as error:
        log.debug("%s", error)
        return NoGpu()
