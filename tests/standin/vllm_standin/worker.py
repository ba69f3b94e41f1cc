"""The worker: one process per GPU. It owns the GPU memory and the weights.

Obeys the engine core over a socket, one request at a time: sleep, wake, reload. It is the process
whose pid stands in the ledger, as a real worker's stands in nvidia-smi.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

# found beside standin.py, which Python puts first on the path
from ledger import DEFAULT_CAPACITY_GIB, GIB, Ledger, OutOfMemoryError, find_start_time

from . import text
from .device import Device, DeviceError
from .faults import Faults
from .options import Options
from .process import Channel, exit_on_sigterm, log, set_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# How soon a restored worker notices by itself that its GPU memory is to be taken again. It also
# looks before every order, so this only bounds how long an idle one is missing from the ledger.
RESTORE_CHECK_SECS = 0.25

# An orphan that no test killed ends by itself.
ORPHAN_LIFETIME_SECS = 600

# vLLM's word for what sleeps and wakes, and the ledger's
KIND_OF_TAG = {"weights": "weights", "kv_cache": "kv"}

# random bytes in pieces, so that filling gigabytes needs no second copy of them
_FILL_BYTES = 1 << 22


class GpuMemory:
    """What this process holds on one GPU, and the ledger's rows for it.

    Invariant: the rows are those of `_held` under this process's pid and start time. CRIU breaks it
    (the pid died at the dump, and has a new start time after the restore); `reclaim_if_restored`
    mends it, or fails as resuming CUDA on a full GPU would.
    """

    def __init__(self, options: Options, gpu: int) -> None:
        self.gpu = gpu
        self.capacity = int((options.capacity_gib or DEFAULT_CAPACITY_GIB) * GIB)
        self._ledger = Ledger(options.ledger, options.capacity_gib) if options.ledger else None
        if self._ledger is not None:
            self.capacity = self._ledger.capacity(gpu)
        self._model = options.name
        self.device: Device | None = None
        if self._ledger is not None and options.device_checks:
            self.device = Device(self._ledger, gpu, options.name)
        self._held: dict[str, int] = {}
        self._start = find_start_time("self") or 0
        self._cuda = f"{options.cuda}/procs/{os.getpid()}" if options.cuda else None

    def use_cuda(self) -> None:
        """From now on a process that the fake driver (tests/fake_libcuda) knows: running."""
        if self._cuda is not None:
            with open(self._cuda, "w", encoding="ascii") as file:
                file.write("0\n")

    def held(self, kind: str) -> int:
        return self._held.get(kind, 0)

    def allocate(self, kind: str, nbytes: int) -> None:
        self.reclaim_if_restored()
        self._register({kind: nbytes})
        self._held[kind] = nbytes

    @property
    def in_use(self) -> int:
        return sum(self._held.values())

    @contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """Memory is mapped or unmapped meanwhile."""
        if self.device is None:
            yield
        else:
            with self.device.moving(what):
                yield

    def free(self, *kinds: str) -> None:
        if self._ledger is not None:
            self._ledger.release(os.getpid(), kinds)
        for kind in kinds:
            self._held.pop(kind, None)

    def reclaim_if_restored(self) -> bool:
        start = find_start_time("self") or 0
        if start == self._start:
            return False
        if self._cuda is not None and not self._is_running():
            return False  # the driver takes the memory when it is told to
        self._start = start
        self._register(self._held)
        return True

    def _is_running(self) -> bool:
        assert self._cuda is not None
        with open(self._cuda, encoding="ascii") as file:
            return file.read().strip() == "0"

    def _register(self, held: dict[str, int]) -> None:
        if self._ledger is not None and held:
            self._ledger.allocate(self.gpu, os.getpid(), self._start, self._model, held)


class HostMemory:
    """Real memory of this process that does not compress, so that images have an honest size."""

    def __init__(self, mib: int) -> None:
        self._nbytes = mib << 20
        self._block: mmap.mmap | None = None

    def fill(self, *, pinned: bool = False) -> None:
        """``pinned``: it cannot be swapped, as vLLM's copy of the weights at level 1."""
        if self._nbytes and self._block is None:
            # private, as malloc's is: CRIU treats shared anonymous memory as a file
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._block = mmap.mmap(-1, self._nbytes, flags=flags)
            for at in range(0, self._nbytes, _FILL_BYTES):
                self._block.write(os.urandom(min(_FILL_BYTES, self._nbytes - at)))
            if pinned:
                _pin(self._block, self._nbytes)

    def drop(self) -> None:
        if self._block is not None:
            self._block.close()
            self._block = None


def _pin(block: mmap.mmap, nbytes: int) -> None:
    import ctypes  # costs milliseconds in every process that has it

    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    if ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(start), nbytes):
        raise RuntimeError(f"cannot pin {nbytes} bytes: {os.strerror(ctypes.get_errno())}")


class Worker:
    """State of one GPU's share of the model."""

    def __init__(self, options: Options, faults: Faults, rank: int, core: Channel) -> None:
        self._options = options
        self._faults = faults
        self._rank = rank
        self._core = core
        self._gpu = GpuMemory(options, options.gpus[rank])
        self._weights_bytes = int(options.weights_gib / options.tensor_parallel_size * GIB)
        self.kv_bytes = 0
        self._host_weights = HostMemory(options.host_weights_mib)
        self._host_backup = HostMemory(options.ram_mib)
        self._asleep: set[str] = set()
        self._level = 0
        self._content = text.GOOD
        self._orphan_made = False

    # start

    def load(self) -> None:
        options = self._options
        device, utilization = self._gpu.device, options.gpu_memory_utilization
        self._gpu.use_cuda()
        if device is not None:
            device.begin(utilization)
        with self._gpu.moving("load"):
            self._gpu.allocate("context", int(options.context_gib * GIB))
            self._gpu.allocate("weights", self._weights_bytes)
            self._load_weights()
            _nap(options.profile_secs)
            if device is not None:
                self.kv_bytes = device.available_for_kv(utilization, self._gpu.in_use)
            else:
                self.kv_bytes = int(utilization * self._gpu.capacity) - self._gpu.in_use
            if self.kv_bytes <= 0:
                raise ValueError(
                    "No available memory for the cache blocks. Try increasing "
                    "`gpu_memory_utilization` when initializing the engine."
                )
            self._gpu.allocate("kv", self.kv_bytes)
        _nap(self._faults.secs("startup_secs", options.startup_secs))

    def _load_weights(self) -> None:
        per_gib = self._faults.secs("load_secs_per_gib", self._options.load_secs_per_gib)
        _nap(per_gib * self._weights_bytes / GIB)
        self._host_weights.fill()
        self._content = text.GOOD

    # orders from the core

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._core, select.POLLIN)
        while True:
            ready = poll.poll(RESTORE_CHECK_SECS * 1000)
            self._after_restore()
            if not self._orphan_made and self._rank == 0 and self._faults.get("orphan"):
                self._make_orphan()
            if not ready:
                continue
            messages = self._core.receive_all()
            if messages is None:
                os._exit(0)  # the core is gone: so are we, and the GPU memory with us
            for message in messages:
                self._core.send(self._obey(message))

    def _obey(self, message: dict[str, Any]) -> dict[str, Any]:
        operation = message["op"]
        if self._faults.get("die_on") == operation:
            log(f"Worker_TP{self._rank}", f"killed in {operation}, as ordered", "ERROR")
            os._exit(1)
        try:
            match operation:
                case "check":
                    pass  # being asked was the point: run() has looked after a restore
                case "sleep":
                    self._sleep(message["level"])
                case "wake":
                    self._wake(message["tags"])
                case "sleep_again":
                    self._gpu.free(*(KIND_OF_TAG[tag] for tag in message["tags"]))
                    self._asleep |= set(message["tags"])
                case "discard":
                    if self._options.sleep_mode:  # else nothing is in vLLM's allocator
                        self._gpu.free(*(KIND_OF_TAG[tag] for tag in message["tags"]))
                case "map":
                    self._map(message["tags"])
                case "reload":
                    self._reload()
        except OutOfMemoryError as error:
            return {"error": str(error)}
        except RuntimeError as error:
            return {"error": str(error)}
        except DeviceError as error:
            print_traceback(str(error), operation)
            os._exit(1)
        return {"content": self._content}

    def _sleep(self, level: int) -> None:
        _nap(self._faults.secs("sleep_secs", self._options.sleep_secs))
        _nap(self._faults.secs("slow_sleep_secs"))
        self._level = level
        self._asleep = {"weights", "kv_cache"}
        if not self._options.sleep_mode:
            return  # vLLM without --enable-sleep-mode: says yes and frees nothing
        if level == 1:
            self._host_backup.fill(pinned=self._options.device_checks)
        else:
            self._host_weights.drop()
            self._content = text.GARBAGE
        if self._faults.get("leak_on_sleep"):
            return
        with self._gpu.moving("sleep"):
            before = self._gpu.device.free() if self._gpu.device is not None else 0
            self._gpu.free("weights", "kv")
            if self._gpu.device is not None:
                self._gpu.device.slept(before)

    def _wake(self, tags: list[str]) -> None:
        _nap(self._faults.secs("wake_secs", self._options.wake_secs))
        _nap(self._faults.secs("slow_wake_secs"))
        sizes = {"weights": self._weights_bytes, "kv": self.kv_bytes}
        with self._gpu.moving("wake_up"):
            for tag in tags:
                kind = KIND_OF_TAG[tag]
                self._gpu.allocate(kind, sizes[kind])
        self._asleep -= set(tags)
        if "weights" in tags:
            self._host_backup.drop()
            if self._content == text.GOOD and self._faults.get("wrong_after_wake"):
                self._content = text.WRONG

    def _map(self, tags: list[str]) -> None:
        """What a discard took; there already is fine."""
        sizes = {"weights": self._weights_bytes, "kv": self.kv_bytes}
        with self._gpu.moving("wake_up"):
            for kind in (KIND_OF_TAG[tag] for tag in tags):
                if not self._gpu.held(kind):
                    self._gpu.allocate(kind, sizes[kind])

    def _reload(self) -> None:
        if "weights" in self._asleep:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self._load_weights()
        if self._faults.get("wrong_after_wake"):
            self._content = text.WRONG

    def _after_restore(self) -> None:
        try:
            if self._gpu.reclaim_if_restored():
                log(f"Worker_TP{self._rank}", "restored; GPU memory taken again")
        except OutOfMemoryError as error:
            print_out_of_memory(error, "restore")
            os._exit(1)

    # the fault of a child that outlives everybody

    def _make_orphan(self) -> None:
        """A daemonised grandchild that ignores SIGTERM and holds GPU memory until it is killed."""
        self._orphan_made = True
        order = self._faults.get("orphan")
        gib = float(order.get("gpu_gib", 1.0)) if isinstance(order, dict) else 1.0
        told, tell = os.pipe()
        child = os.fork()
        if child:
            os.close(tell)
            os.read(told, 1)  # until it is in the ledger: who reads it next must see it
            os.close(told)
            os.waitpid(child, 0)
            return
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        os.closerange(3, tell)
        os.closerange(tell + 1, 256)
        set_name("standin-orphan")
        try:
            GpuMemory(self._options, self._gpu.gpu).allocate("context", int(gib * GIB))
        except OutOfMemoryError:
            os._exit(1)
        os.write(tell, b"x")
        os.close(tell)
        time.sleep(ORPHAN_LIFETIME_SECS)
        os._exit(0)


def run_worker(options: Options, faults: Faults, rank: int, sock: socket.socket) -> None:
    """Body of the forked process; does not return."""
    exit_on_sigterm(faults)
    set_name(f"VLLM::Worker_TP{rank}")
    core = Channel(sock)
    worker = Worker(options, faults, rank, core)
    try:
        worker.load()
    except OutOfMemoryError as error:
        print_out_of_memory(error, "load_model")
        core.send({"error": f"torch.OutOfMemoryError: {error}"})
        os._exit(1)
    except DeviceError as error:
        print_traceback(str(error), "determine_available_memory")
        core.send({"error": str(error)})
        os._exit(1)
    except ValueError as error:
        log("EngineCore", f"ValueError: {error}", "ERROR")
        core.send({"error": f"ValueError: {error}"})
        os._exit(1)
    core.send({"ready": True, "pid": os.getpid(), "kv_bytes": worker.kv_bytes})
    worker.run()


def print_out_of_memory(error: OutOfMemoryError, function: str) -> None:
    print_traceback(f"torch.OutOfMemoryError: {error}", function)


def print_traceback(error: str, function: str) -> None:
    """The traceback that operators know; the lines of files are made up."""
    lines = (
        "EngineCore failed to start."
        if function in ("load_model", "determine_available_memory")
        else "EngineCore hit an exception.",
        "Traceback (most recent call last):",
        '  File "vllm/v1/engine/core.py", line 1495, in run_engine_core',
        "    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)",
        f'  File "vllm/v1/worker/gpu_worker.py", line 402, in {function}',
        f"    self.model_runner.{function}()",
        error,
    )
    log("EngineCore", "\n".join(lines), "ERROR")


def _nap(secs: float) -> None:
    if secs > 0:
        time.sleep(secs)
