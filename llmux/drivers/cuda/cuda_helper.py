"""The resident CUDA helper: a separate process that makes the driver's checkpoint calls for us.

Started by ``driver.py`` as ``python3 -I cuda_helper.py --library libcuda.so.1``; imports nothing
from llmux. Newline-delimited JSON: requests on stdin, answers on stdout as the calls end. The first
line out is the greeting: driver version, missing symbols, result of cuInit.

Why a process: a driver call can hang for ever, and it must hang where nothing else waits.
Why resident: cuInit alone takes seconds on an 8-GPU host (2.7 s measured by nvsnap on 8 x H100).
It never makes a CUDA context, so it holds no GPU memory. It is never ended inside an operation:
interrupting one can leave the target out of step with the driver (criu#2547). So the end of stdin,
SIGTERM and SIGINT all mean: take nothing new, finish what runs, then go.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

CALLS = {
    "restore_tid": "cuCheckpointProcessGetRestoreThreadId",
    "state": "cuCheckpointProcessGetState",
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
}
READ_BYTES = 1 << 16
BASIC_CALLS = ("cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString")


class Args(ctypes.Structure):
    """CUcheckpoint{Lock,Checkpoint,Restore,Unlock}Args: 64 bytes, all zero but the lock's timeout.

    cuda.h >= 12.8: ``{unsigned timeoutMs; unsigned reserved0; cuuint64_t reserved1[7]}``; the other
    three are reserved words, or (restore, 13.0) a GPU map: a NULL pointer and count 0 mean none.
    """

    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


assert ctypes.sizeof(Args) == 64, "cuda.h fixes these structures at 64 bytes"


class Library:
    """libcuda.so.1 with the ten functions that we use; ``problem`` says why it cannot be used."""

    def __init__(self, path: str) -> None:
        self.missing: list[str] = []
        self.driver_version = 0
        self.init_code = 0
        self.problem: str | None = None
        self._functions: dict[str, Any] = {}
        try:
            # CDLL, not PyDLL: the GIL is released during a call, so other threads go on.
            self._dll = ctypes.CDLL(path)
        except OSError as error:
            reason = str(error).removeprefix(f"{path}: ")  # dlerror(3) names it itself
            self.problem = f"cannot load {path}: {reason}"
            return
        for name in (*BASIC_CALLS, *CALLS.values()):
            self._resolve(name)
        if "cuDriverGetVersion" in self._functions:
            version = ctypes.c_int(0)
            if self._functions["cuDriverGetVersion"](ctypes.byref(version)) == 0:
                self.driver_version = version.value
        if not self.missing:
            self.init_code = int(self._functions["cuInit"](0))

    def _resolve(self, name: str) -> None:
        try:
            function = getattr(self._dll, name)
        except AttributeError:
            self.missing.append(name)
            return
        function.restype = ctypes.c_int
        if name.startswith("cuGetError"):
            function.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
        elif name in CALLS.values():
            function.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._functions[name] = function

    def greeting(self) -> dict[str, Any]:
        return {
            "hello": 1,
            "pid": os.getpid(),
            "driver_version": self.driver_version,
            "missing": self.missing,
            "problem": self.problem,
            **self.describe(self.init_code),
        }

    @property
    def usable(self) -> bool:
        return self.problem is None and not self.missing and self.init_code == 0

    def describe(self, code: int) -> dict[str, Any]:
        """A CUresult with its name and text, in the driver's own words."""
        if code == 0:
            return {"code": 0}
        return {
            "code": code,
            "name": self._words("cuGetErrorName", code) or f"CUDA_ERROR_{code}",
            "text": self._words("cuGetErrorString", code) or "unknown error",
        }

    def _words(self, function: str, code: int) -> str:
        words = ctypes.c_char_p()
        self._functions[function](code, ctypes.byref(words))  # NULL for a code it does not know
        return (words.value or b"").decode(errors="replace")

    def call(self, operation: str, pid: int, timeout_ms: int) -> dict[str, Any]:
        """One driver call, to its end however long it takes."""
        function = self._functions[CALLS[operation]]
        if operation in ("restore_tid", "state"):
            value = ctypes.c_int(-1)
            code = int(function(pid, ctypes.byref(value)))
            return {**self.describe(code), "value": value.value}
        args = Args(timeout_ms=timeout_ms if operation == "lock" else 0)
        return self.describe(int(function(pid, ctypes.byref(args))))


class Server:
    """Reads requests, runs each in its own thread, writes answers; knows how many are running."""

    def __init__(self, library: Library, source: int, stop: int, sink: BinaryIO) -> None:
        """``source`` and ``stop`` are descriptors: requests, and what is readable from SIGTERM or
        SIGINT on."""
        self._library = library
        self._source = source
        self._stop = stop
        self._sink = sink
        self._writing = threading.Lock()
        self._threads: list[threading.Thread] = []

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._writing:
            try:
                self._sink.write(line)
                self._sink.flush()
            except OSError:
                return  # the supervisor is gone: running calls finish, their answers are dropped

    def serve(self) -> None:
        for line in self._requests():
            self._begin(line)
        for thread in self._threads:
            thread.join()

    def _requests(self) -> Iterator[bytes]:
        """Requests in order; ends at end of file or on a signal."""
        poll = select.poll()
        for descriptor in (self._source, self._stop):
            poll.register(descriptor, select.POLLIN)
        rest = b""
        while self._stop not in dict(poll.poll()):
            try:
                data = os.read(self._source, READ_BYTES)
            except ConnectionResetError:  # the supervisor went with answers of ours unread
                return
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines

    def _begin(self, line: bytes) -> None:
        request = json.loads(line)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._answer, args=(request,))
        self._threads.append(thread)
        thread.start()

    def _answer(self, request: dict[str, Any]) -> None:
        pid = int(request["pid"])
        result = self._library.call(str(request["op"]), pid, int(request.get("timeout_ms", 0)))
        self.send({"id": request["id"], **result})


def _stop_signals() -> socket.socket:
    """A socket that is readable from the first SIGTERM or SIGINT on. The interpreter's own handler
    writes to it whatever the main thread is doing: an exception raised out of a read would be lost
    if the signal came just before that read began."""
    readable, writable = socket.socketpair()
    writable.setblocking(False)
    signal.set_wakeup_fd(writable.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable


def main(open_library: Callable[[str], Library] = Library) -> int:
    parser = argparse.ArgumentParser(description="llmux's CUDA helper; started by llmux only")
    parser.add_argument("--library", default="libcuda.so.1")
    arguments = parser.parse_args()
    # What libcuda itself might print must not end up between our answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    library = open_library(arguments.library)
    # Only now: a helper that hangs in cuInit, before any operation, may be ended.
    stop = _stop_signals()
    server = Server(library, sys.stdin.fileno(), stop.fileno(), answers)
    server.send(library.greeting())
    if not library.usable:
        return 1
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
