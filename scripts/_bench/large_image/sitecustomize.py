"""Makes a server's image large: Python imports this at the start of each process of a model.

The one that serves holds ``LLMUX_BENCH_BALLAST`` bytes that no answer touches, none of them zero
pages, as the weights and the heap of a real model are that wait in host memory.
"""

import mmap
import os
import pathlib

_CHUNK = 1 << 24


def _hold(size: int) -> mmap.mmap:
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    chunk = os.urandom(_CHUNK)
    while held.tell() < size:
        held.write(chunk[: size - held.tell()])
    return held


if b"serve" in pathlib.Path("/proc/self/cmdline").read_bytes().split(b"\0"):
    _held = _hold(int(os.environ["LLMUX_BENCH_BALLAST"]))
