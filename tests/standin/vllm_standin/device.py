"""What vLLM concludes from the free memory of the whole device, whichever process took or freed it.

vLLM 0.32 looks at the device, not at itself: when it starts (is there as much free as it was
promised?), when it profiles (what was taken since is its own, and what was freed is an error) and
when it sleeps (less free than before is an error). A second engine that moves memory meanwhile
makes it fail, or serve with too little. Each such complaint is also a line in LEDGER.complaints.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ledger import GIB, Ledger, open_for_all


class DeviceError(Exception):
    """vLLM's own complaint, in its words; the engine ends by it."""


class Device:
    """One GPU as a worker of `model` sees it."""

    def __init__(self, ledger: Ledger, gpu: int, model: str) -> None:
        self._ledger = ledger
        self._gpu = gpu
        self._model = model
        self._total = ledger.capacity(gpu)
        self._at_start = 0

    def free(self) -> int:
        return self._total - self._ledger.used(self._gpu)

    def begin(self, utilization: float) -> None:
        """At start, before anything is allocated."""
        self._at_start = self.free()
        requested = utilization * self._total
        if self._at_start < requested:
            self._fail(
                f"ValueError: Free memory on device cuda:0 ({_gib(self._at_start)}/"
                f"{_gib(self._total)} GiB) on startup is less than desired GPU memory utilization "
                f"({utilization}, {_gib(requested)} GiB). Decrease GPU memory utilization or reduce"
                " GPU memory used by other processes."
            )

    def available_for_kv(self, utilization: float, own: int) -> int:
        """After profiling, with `own` bytes allocated: what is left of what was promised."""
        now = self.free()
        taken = self._at_start - now
        if taken < own:
            self._fail(
                "AssertionError: Error in memory profiling. Initial free memory "
                f"{_gib(self._at_start)} GiB, current free memory {_gib(now)} GiB. This happens"
                " when other processes sharing the same container release GPU memory while vLLM is"
                " profiling during initialization."
            )
        if taken > own:
            self._note(f"{_gib(taken - own)} GiB of another engine are taken for its own")
        available = int(utilization * self._total) - taken
        if available <= 0:
            self._fail(
                "ValueError: No available memory for the cache blocks. Try increasing"
                " `gpu_memory_utilization` when initializing the engine."
            )
        return available

    def slept(self, before: int) -> None:
        if self.free() < before:
            self._fail("AssertionError: Memory usage increased after sleeping.")

    @contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """Memory is mapped or unmapped; beside another engine's that hangs or kills it."""
        fd = open_for_all(f"{self._ledger.path}.moving.{self._gpu}", os.O_RDWR)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._fail(f"EngineDeadError: {what} while another engine moves memory")
            yield
        finally:
            os.close(fd)

    def _fail(self, text: str) -> None:
        self._note(text)
        raise DeviceError(text)

    def _note(self, text: str) -> None:
        path = f"{self._ledger.path}.complaints"
        fd = open_for_all(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, f"GPU {self._gpu}, {self._model}: {text}\n".encode())
        finally:
            os.close(fd)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
