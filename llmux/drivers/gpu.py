"""Who holds how much GPU memory: NVML, the ledger of pretended GPUs, or nobody knows."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from llmux.drivers.process import read_stat
from llmux.errors import DriverError, Unsupported
from llmux.ports import GpuObserver, GpuProcess

log = logging.getLogger(__name__)

LEDGER_VARIABLE: Final = "LLMUX_GPU_LEDGER"
_NOT_AVAILABLE: Final = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE, e.g. under WSL
_SUCCESS: Final = 0
_INSUFFICIENT_SIZE: Final = 7

_T = TypeVar("_T")


class NoGpu:
    """Nothing is known; releases are taken on trust."""

    @property
    def available(self) -> bool:
        return False

    async def gpu_count(self) -> int:
        return 0

    async def processes(self) -> Sequence[GpuProcess]:
        return ()

    async def totals(self) -> Mapping[int, int]:
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


class NvmlObserver:
    """NVML by ctypes, in a thread of its own: its calls take milliseconds, and the first a second.

    Raises Unsupported when there is no libnvidia-ml.so.1 or it does not start. Pids are the host's.
    """

    def __init__(self, library: str = "libnvidia-ml.so.1") -> None:
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError as error:
            raise Unsupported("observe", "the GPUs", f"{library} is not here: {error}") from error
        self._check(self._nvml.nvmlInit_v2(), "nvmlInit")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmux-nvml")

    @property
    def available(self) -> bool:
        return True

    async def gpu_count(self) -> int:
        return await self._in_thread(self._count)

    async def processes(self) -> Sequence[GpuProcess]:
        def look() -> list[GpuProcess]:
            return [process for gpu in range(self._count()) for process in self._processes_of(gpu)]

        return await self._in_thread(look)

    async def totals(self) -> Mapping[int, int]:
        def look() -> dict[int, int]:
            memory = _Memory()
            found = {}
            for gpu in range(self._count()):
                code = self._nvml.nvmlDeviceGetMemoryInfo(self._device(gpu), ctypes.byref(memory))
                self._check(code, "nvmlDeviceGetMemoryInfo")
                found[gpu] = int(memory.total)
            return found

        return await self._in_thread(look)

    async def close(self) -> None:
        await self._in_thread(lambda: self._nvml.nvmlShutdown())
        self._thread.shutdown(wait=False)

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

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
        return [
            GpuProcess(gpu, row.pid, 0 if row.used == _NOT_AVAILABLE else int(row.used))
            for row in table[: count.value]
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

    A row counts while its process lives with the start time that it was made with.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def available(self) -> bool:
        return True

    async def gpu_count(self) -> int:
        return len(self._read()["gpus"])

    async def processes(self) -> Sequence[GpuProcess]:
        held: dict[tuple[int, int], int] = {}
        for row in self._read()["rows"]:
            stat = read_stat(int(row["pid"]))
            if stat is not None and stat[2] not in "ZX" and stat[1] == int(row["start"]):
                key = int(row["gpu"]), int(row["pid"])
                held[key] = held.get(key, 0) + int(row["bytes"])
        return [GpuProcess(gpu, pid, used) for (gpu, pid), used in sorted(held.items())]

    async def totals(self) -> Mapping[int, int]:
        gpus = self._read()["gpus"]
        return {int(gpu): int(entry["capacity"]) for gpu, entry in sorted(gpus.items())}

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


def find_gpu_observer() -> GpuObserver:
    """The ledger that $LLMUX_GPU_LEDGER names, else NVML, else nothing."""
    if path := os.environ.get(LEDGER_VARIABLE):
        return LedgerObserver(path)
    try:
        return NvmlObserver()
    except Unsupported as error:
        log.debug("%s", error)
        return NoGpu()
