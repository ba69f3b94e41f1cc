"""Read weights into the page cache, at the lowest priority, as far as memory allows.

Started by ``weights.py`` as ``python3 -I weights_reader.py UID GID GROUPS PATH…``; imports nothing
of llmux. It becomes the engine's user first: a model's directory may be that user's, and what a
link in it leads to must be opened with no more rights than the engine has. Whoever started it kills
it when the weights are not needed after all. Prints the bytes that lie in the cache now.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress

WINDOW = 4 << 20  # read at once
INDEX = "model.safetensors.index.json"
# Half: reading pushes out other files' pages, which other models' next start may need.
SHARE = 0.5


def become(uid: int, gid: int, groups: list[int]) -> None:
    if os.geteuid() == 0 and uid != 0:
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        lines = (line.split() for line in file)
        return next(int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:")


def weights_of(path: str) -> list[str]:
    """The files that a start reads: those of the index, where there is one, since a directory may
    hold the same weights twice."""
    if not os.path.isdir(path):
        return [path]
    names = sorted(os.listdir(path))
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        with open(os.path.join(path, INDEX)) as file:
            wanted = set(json.load(file)["weight_map"].values())
        return [os.path.join(path, name) for name in names if name in wanted]
    for ending in (".safetensors", ".bin", ".pt", ".gguf"):
        if found := [os.path.join(path, name) for name in names if name.endswith(ending)]:
            return found
    return []


def windows(fd: int) -> Iterator[tuple[int, int]]:
    size = os.fstat(fd).st_size
    for start in range(0, size, WINDOW):
        yield start, min(WINDOW, size - start)


def read(path: str, budget: int) -> int:
    """Bytes of the file that lie in the cache now, at most ``budget``."""
    done = 0
    buffer = bytearray(WINDOW)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return 0
        for start, length in windows(fd):
            if done + length > budget:
                break
            # Not POSIX_FADV_WILLNEED: of a window Linux reads no more then than one request of the
            # disk takes: 8 MiB of 16 where this was seen.
            done += os.preadv(fd, [memoryview(buffer)[:length]], start)
    finally:
        os.close(fd)
    return done


def main(arguments: list[str]) -> None:
    uid, gid, groups, *paths = arguments
    become(int(uid), int(gid), [int(group) for group in groups.split(",") if group])
    os.nice(19)
    budget = int(available_bytes() * SHARE)
    done = 0
    for path in paths:
        with suppress(OSError):
            for name in weights_of(path):
                done += read(name, budget - done)
    sys.stdout.write(f"{done}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
