"""The weights of beta come into the page cache while alpha drains; prints a JSON report.

alpha streams for as long as its client stays; beta, which never ran, is asked for meanwhile. How
much of beta's weights lies in the page cache is what mincore(2) says.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import pathlib
import sys
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import client
import witness

SIZE = 96 << 20  # more than what a process of its own is started for
LONG = 4_000  # tokens: more than this run lasts
PAGE = mmap.PAGESIZE


def make(path: str) -> None:
    """On the disk, and not in the page cache."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.chmod(path, 0o644)


def resident(path: str) -> int:
    """Bytes of the file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        pages = (len(mapped) + PAGE - 1) // PAGE
        found = (ctypes.c_ubyte * pages)()
        code = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(SIZE), found)
        del view
        if code:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(one & 1 for one in found) * PAGE


def in_flight(model: str) -> int:
    with urllib.request.urlopen("http://127.0.0.1:3000/control/status", timeout=30) as answer:
        return int(json.load(answer)["models"][model]["in_flight"])


async def run(path: str) -> dict[str, object]:
    first = await client.ask("alpha", "first")
    make(path)
    before = resident(path)
    streaming = asyncio.create_task(
        client.ask("alpha", "long", stream=True, tokens=LONG, timeout=600)
    )
    await asyncio.to_thread(witness.until, "alpha streams", lambda: in_flight("alpha"), 60)
    asking = asyncio.create_task(client.ask("beta", "next", timeout=120))
    most = SIZE - SIZE // 8  # a host that is short of memory takes pages back
    read = f"{most} bytes of weights are read"
    await asyncio.to_thread(witness.until, read, lambda: resident(path) >= most, 60)
    seen = resident(path)
    states, running = witness.states(), sorted(witness.scopes())
    streaming.cancel()
    await asyncio.gather(streaming, return_exceptions=True)
    answer = await asking
    return {
        "errors": [one.error for one in (first, answer) if one.error],
        "before": before,
        "read": seen,
        "size": SIZE,
        "meanwhile": states,
        "engines meanwhile": running,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1]))))
