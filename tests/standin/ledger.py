#!/usr/bin/env python3
"""GPU memory of pretended GPUs: one JSON file that all stand-in engines allocate from.

The file plays the kernel driver's part. It holds, per GPU, how much memory there is, and one row
per allocation: (gpu, pid, start time, model, kind, bytes). A row counts only while its process
lives with the start time it was made with, so a SIGKILL frees memory as the driver does, and a
process that CRIU brought back under its old pid holds nothing until it allocates again.

Every change happens under an exclusive flock on `<path>.lock`; the file itself is replaced by
rename, so a reader without the lock sees one whole state.

    ledger.py init [PATH] [--capacity-gib 80] [--gpus 1]
    ledger.py show [PATH]

Without PATH the environment variable STANDIN_LEDGER names the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TYPE_CHECKING = False  # importing typing costs milliseconds in every process of the tree
if TYPE_CHECKING:
    from typing import Any

GIB = 1024**3
DEFAULT_CAPACITY_GIB = 80.0
KINDS = ("context", "weights", "kv")

# A process that was frozen inside the locked section would block every other engine for ever;
# past this the allocation fails loudly instead.
LOCK_TIMEOUT_SECS = 10.0

_PF_EXITING = 0x4  # linux/sched.h; the flags are the ninth field of /proc/PID/stat


class OutOfMemoryError(Exception):
    """The allocation does not fit; the text is PyTorch's."""


class Row:
    """One live allocation."""

    __slots__ = ("gpu", "kind", "model", "nbytes", "pid", "start")

    def __init__(self, gpu: int, pid: int, start: int, model: str, kind: str, nbytes: int) -> None:
        self.gpu = gpu
        self.pid = pid
        self.start = start
        self.model = model
        self.kind = kind
        self.nbytes = nbytes

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu,
            "pid": self.pid,
            "start": self.start,
            "model": self.model,
            "kind": self.kind,
            "bytes": self.nbytes,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Row:
        return cls(
            int(raw["gpu"]),
            int(raw["pid"]),
            int(raw["start"]),
            str(raw["model"]),
            str(raw["kind"]),
            int(raw["bytes"]),
        )


def find_start_time(pid: int | str) -> int | None:
    """Start time of a process in clock ticks since boot; None when it is gone or going.

    The driver frees GPU memory when a dying process's files are closed, well before its parent has
    been told or has reaped it, so one that is exiting or a zombie counts as gone.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # the second field is the command in parentheses and may hold anything, ")" included
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in (b"Z", b"X") or int(fields[6]) & _PF_EXITING:
        return None
    return int(fields[19]) - _time_namespace_offset()


def _time_namespace_offset() -> int:
    """What the kernel adds to the start times this process reads, in clock ticks.

    CRIU restores a tree into a time namespace of its own, in which the clocks go on from the moment
    of the dump; so a restored engine and everybody else read different start times of the same
    process unless each takes its own offset off.
    """
    try:
        with open("/proc/self/timens_offsets", encoding="ascii") as offsets:
            for line in offsets:
                clock, secs, nanosecs = line.split()
                if clock == "boottime":
                    nanos = int(secs) * 10**9 + int(nanosecs)
                    return nanos // (10**9 // os.sysconf("SC_CLK_TCK"))
    except FileNotFoundError:
        pass  # a kernel without time namespaces
    return 0


class Ledger:
    """The file, and every way to read or change it."""

    def __init__(
        self,
        path: str,
        default_capacity_gib: float = DEFAULT_CAPACITY_GIB,
        lock_timeout: float = LOCK_TIMEOUT_SECS,
    ) -> None:
        self.path = path
        self._lock_timeout = lock_timeout
        self._default_capacity = int(default_capacity_gib * GIB)

    # reading

    def rows(self) -> list[Row]:
        """Allocations of processes that live now."""
        return _live(self._read())

    def capacity(self, gpu: int) -> int:
        return self._capacity(self._read(), gpu)

    def used(self, gpu: int) -> int:
        return sum(row.nbytes for row in self.rows() if row.gpu == gpu)

    def usage_by_model(self) -> dict[str, int]:
        """Bytes held per model, over all GPUs; a model that holds nothing is not in it."""
        usage: dict[str, int] = {}
        for row in self.rows():
            usage[row.model] = usage.get(row.model, 0) + row.nbytes
        return usage

    def show(self) -> dict[str, Any]:
        """Everything, as plain data for people and for JSON."""
        data = self._read()
        rows = _live(data)
        gpus = sorted({int(gpu) for gpu in data["gpus"]} | {row.gpu for row in rows})
        shown: dict[str, Any] = {"gpus": {}, "models": {}, "rows": [row.to_json() for row in rows]}
        for gpu in gpus:
            capacity = self._capacity(data, gpu)
            used = sum(row.nbytes for row in rows if row.gpu == gpu)
            shown["gpus"][str(gpu)] = {
                "capacity": capacity,
                "used": used,
                "free": capacity - used,
            }
        for row in rows:
            kinds = shown["models"].setdefault(row.model, {"total": 0})
            kinds["total"] += row.nbytes
            kinds[row.kind] = kinds.get(row.kind, 0) + row.nbytes
        return shown

    # changing

    def init(self, gpus: int = 1) -> None:
        """Begin a new ledger with this many GPUs of the default capacity, all of it free."""
        with self._locked():
            data = _empty()
            for gpu in range(gpus):
                data["gpus"][str(gpu)] = {"capacity": self._default_capacity}
            self._write(data)

    def allocate(self, gpu: int, pid: int, start: int, model: str, held: dict[str, int]) -> None:
        """Give `pid` these bytes per kind on one GPU, all of them or, with OutOfMemoryError, none.

        What the process already holds of a kind is replaced.
        """

        def change(data: dict[str, Any], rows: list[Row]) -> list[Row]:
            kept = [row for row in rows if (row.pid, row.gpu) != (pid, gpu) or row.kind not in held]
            capacity = self._capacity(data, gpu)
            free = capacity - sum(row.nbytes for row in kept if row.gpu == gpu)
            wanted = sum(held.values())
            if wanted > free:
                own = sum(row.nbytes for row in kept if row.pid == pid)
                raise OutOfMemoryError(out_of_memory_text(gpu, wanted, capacity, free, own))
            data["gpus"].setdefault(str(gpu), {"capacity": capacity})
            new = [Row(gpu, pid, start, model, kind, size) for kind, size in held.items()]
            return kept + new

        self._change(change)

    def release(self, pid: int, kinds: tuple[str, ...] = KINDS) -> None:
        """Take these kinds of allocation from a process; those it does not hold are ignored."""
        self._change(
            lambda _data, rows: [row for row in rows if row.pid != pid or row.kind not in kinds]
        )

    # the file

    def _capacity(self, data: dict[str, Any], gpu: int) -> int:
        entry = data["gpus"].get(str(gpu))
        return int(entry["capacity"]) if entry else self._default_capacity

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return _empty()
        if not text.strip():
            return _empty()
        data: dict[str, Any] = json.loads(text)
        return data

    def _write(self, data: dict[str, Any]) -> None:
        text = json.dumps(data, indent=1) + "\n"
        temporary = f"{self.path}.{os.getpid()}.tmp"
        # 0666 whatever the umask: engines of several users share one GPU
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.fchmod(fd, 0o666)
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        os.rename(temporary, self.path)

    def _change(self, change: Callable[[dict[str, Any], list[Row]], list[Row]]) -> None:
        with self._locked():
            data = self._read()
            rows = change(data, _live(data))
            data["rows"] = [row.to_json() for row in rows]
            self._write(data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = open_for_all(f"{self.path}.lock", os.O_RDWR)
        try:
            self._lock(fd)
            yield
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        """flock knows no time limit: a thread waits in it, and we for the thread.

        The lock belongs to the open file, so our own second call tells whether it was got; a thread
        that still waits goes with the lock's holder and leaves no lock behind, as `fd` is closed.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            import threading  # only who has to wait pays for it

        waiting = threading.Thread(target=fcntl.flock, args=(fd, fcntl.LOCK_EX), daemon=True)
        waiting.start()
        waiting.join(self._lock_timeout)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TimeoutError(
                f"cannot lock the GPU ledger {self.path}: held for "
                f"{self._lock_timeout:g}s, perhaps by a frozen engine"
            ) from None


def open_for_all(path: str, flags: int) -> int:
    """Made with its mode at once: engines of several users begin in the same moment."""
    former = os.umask(0)
    try:
        return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o666)
    finally:
        os.umask(former)


def _empty() -> dict[str, Any]:
    return {"version": 1, "gpus": {}, "rows": []}


def _live(data: dict[str, Any]) -> list[Row]:
    rows = [Row.from_json(raw) for raw in data["rows"]]
    starts = {pid: find_start_time(pid) for pid in {row.pid for row in rows}}
    # one tick of tolerance: both sides round after adding the offset of their time namespace
    return [row for row in rows if abs((starts[row.pid] or 0) - row.start) <= 1]


def out_of_memory_text(gpu: int, wanted: int, capacity: int, free: int, own: int) -> str:
    return (
        f"CUDA out of memory. Tried to allocate {_size(wanted)}. "
        f"GPU {gpu} has a total capacity of {_size(capacity)} of which {_size(max(free, 0))} "
        f"is free. Including non-PyTorch memory, this process has {_size(own)} memory in use."
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 1024**2:.2f} MiB"


def main(argv: list[str]) -> int:
    import argparse  # only the command line pays for it

    parser = argparse.ArgumentParser(prog="ledger.py", description="the stand-in GPUs' memory")
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="print live allocations as JSON")
    init = verbs.add_parser("init", help="begin a new ledger, everything free")
    for verb in (show, init):
        verb.add_argument("path", nargs="?", default=os.environ.get("STANDIN_LEDGER"))
    init.add_argument("--capacity-gib", type=float, default=DEFAULT_CAPACITY_GIB)
    init.add_argument("--gpus", type=int, default=1)
    args = parser.parse_args(argv)
    if args.path is None:
        parser.error("no ledger: name its path or set STANDIN_LEDGER")
    if args.verb == "init":
        Ledger(args.path, args.capacity_gib).init(args.gpus)
    print(json.dumps(Ledger(args.path).show(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
