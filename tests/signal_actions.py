"""What is done at a signal, kept as the C library has it.

Python's own memory of a handler is not enough: libuv sets one for SIGCHLD, once for all its loops
of a process. A test in whose course Python sets another, and then its own former one, leaves every
loop of the process without news of children that end.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIZE = 512  # of struct sigaction, with room: 152 bytes on x86-64


def _sigaction(number: int, new: object, old: object) -> None:
    if ctypes.CDLL(None, use_errno=True).sigaction(number, new, old) != 0:
        raise OSError(ctypes.get_errno(), "sigaction failed")


@contextmanager
def child_action_as_it_was() -> Iterator[None]:
    action = ctypes.create_string_buffer(SIZE)
    _sigaction(signal.SIGCHLD, None, action)
    former = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if former is not None:
            signal.signal(signal.SIGCHLD, former)  # Python's memory of it
        _sigaction(signal.SIGCHLD, action, None)
        os.kill(os.getpid(), signal.SIGCHLD)  # of those that ended meanwhile
