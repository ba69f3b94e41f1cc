"""What starts CRIU so that restored engines may use AMX: it changes nothing else."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from typing import Any

import pytest

from llmux.drivers.criu import amx

# arch_prctl(ARCH_GET_XCOMP_PERM), asked by the program and by its child
ASK = """
import ctypes, os
mask = ctypes.c_ulong()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))
print(mask.value >> 18 & 1, flush=True)
if os.fork() == 0:
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))
    print(mask.value >> 18 & 1, flush=True)
    os._exit(0)
os.wait()
"""
PYTHON = os.path.realpath(sys.executable)  # an executable: a script in between would exec again


# asks for the right, in a process of its own
REQUEST = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(158, 0x1023, 18):
    print(f"AMX was not permitted: {os.strerror(ctypes.get_errno())}")
"""

# amx.py, one request of which to ptrace(2) is refused
REFUSED = """
import ctypes, runpy, sys
_, path, refused, *argv = sys.argv
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
def ptrace(request, *words):
    if request == int(refused):
        if Library.use_errno:
            ctypes.set_errno(1)
        return -1
    return libc.ptrace(request, *words)
class Library:
    def __init__(self, name, use_errno=False):
        Library.use_errno = use_errno
Library.ptrace = staticmethod(ptrace)
ctypes.CDLL = Library
ctypes.set_errno(1)  # of a call before
sys.argv = [path, *argv]
runpy.run_path(path, run_name="__main__")
"""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return outcome(amx.wrapped(list(argv)))


def outcome(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)


def test_the_program_and_its_children_have_the_right_where_there_is_one() -> None:
    done = run(PYTHON, "-I", "-c", ASK)
    assert (done.returncode, done.stderr) == (0, "") or not amx.is_needed()
    assert done.stdout.split() == [str(int(amx.is_needed()))] * 2


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -signal.SIGKILL)]
)
def test_it_ends_as_the_program_ends(script: str, status: int) -> None:
    assert run("/bin/sh", "-c", script).returncode == status


def test_a_program_that_is_not_there_is_named() -> None:
    done = run("/nonexistent/criu")
    assert done.returncode == 127
    assert done.stderr == "/nonexistent/criu: [Errno 2] No such file or directory\n"


def test_what_the_kernel_says_is_told_and_the_program_runs_as_ever() -> None:
    asked = outcome([PYTHON, "-I", "-S", "-c", REQUEST])
    done = run("/bin/sh", "-c", "echo $0 $1; exit 5", "a", "b c")
    assert (done.returncode, done.stdout, done.stderr) == (5, "a b c\n", asked.stdout)


@pytest.mark.parametrize(
    ("request_", "status", "printed", "said"),
    [
        (0, 127, "", "/bin/sh: [Errno 1] ptrace request 0: Operation not permitted\n"),
        (1, 5, "a\n",
         "AMX could not be asked for: [Errno 1] ptrace request 1: Operation not permitted\n"),
        (12, 5, "a\n",
         "AMX could not be asked for: [Errno 1] ptrace request 12: Operation not permitted\n"),
    ],
)  # fmt: skip
def test_a_program_runs_although_its_tracer_may_not_ask(
    request_: int, status: int, printed: str, said: str
) -> None:
    argv = ["/bin/sh", "-c", "echo a; exit 5"]
    done = outcome([PYTHON, "-I", "-S", "-c", REFUSED, amx.__file__, str(request_), *argv])
    assert (done.returncode, done.stdout, done.stderr) == (status, printed, said)


class Kernel:
    """What the C library's syscall(2) answers: the features that a processor and it support."""

    def __init__(self, supported: int | None) -> None:
        self.supported = supported
        self.asked: list[tuple[int, int]] = []

    def __call__(self, number: Any, code: Any, mask: Any) -> int:
        self.asked.append((number.value, code.value))
        if self.supported is None:
            return -1
        mask._obj.value = self.supported
        return 0

    ptrace = syscall = property(lambda self: self)


@pytest.mark.parametrize(
    ("machine", "supported", "needed"),
    [
        ("x86_64", 1 << 18, True),
        ("x86_64", 0x602E7, True),
        ("x86_64", 0x202E7, False),
        ("x86_64", 1 << 19, False),
        ("x86_64", None, False),
        ("aarch64", 1 << 18, False),
    ],
)
def test_the_right_is_asked_for_where_there_are_tiles(
    monkeypatch: pytest.MonkeyPatch, machine: str, supported: int | None, needed: bool
) -> None:
    kernel = Kernel(supported)
    with monkeypatch.context() as patched:
        patched.setattr(ctypes, "CDLL", lambda *_, **__: kernel)
        of_this_kernel = runpy.run_path(amx.__file__)
    uname = os.uname_result(("Linux", "h", "6", "1", machine))
    monkeypatch.setattr(os, "uname", lambda: uname)
    assert of_this_kernel["is_needed"]() is needed
    assert kernel.asked == ([(158, 0x1021)] if machine == "x86_64" else [])
