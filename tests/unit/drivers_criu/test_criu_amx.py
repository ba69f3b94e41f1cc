"""What starts CRIU so that restored engines may use AMX: it changes nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        amx.wrapped(list(argv)), capture_output=True, text=True, check=False, timeout=30
    )


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
    assert "/nonexistent/criu" in done.stderr
