"""Pages that are zero need not be in an image: they are taken out of it right after the dump.

CRIU stores every page that a process has touched. Those of a zeroed KV cache cost a restore as much
as any others: read, copied, and memory for each. A page of a private anonymous mapping that is in
no pagemap is one that the process never touched, which reads as zero; so it was before the dump and
so it is afterwards. A child of a fork that shares the mapping is no exception: CRIU drops what the
parent has and the child's pagemap lacks (criu/mem.c: restore_priv_vma_content).

The pages file is one sequence without addresses, so what stays moves down within it. Nobody has
seen the image yet; whoever dies here leaves one that was never completed.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Final

from llmux.drivers.criu_img import (
    PAGE_SIZE,
    BadImage,
    Pages,
    anonymous_memory,
    read_pagemap,
    write_pagemap,
)
from llmux.drivers.images_files import threads

# Fewer zero pages than this stay: each gap makes an entry more, and a read that is cut in two.
LEAST: Final = 16
_PIECE: Final = 64  # pages; stays in the level-2 cache
_ZERO: Final = bytes(PAGE_SIZE)
_PAGEMAP: Final = re.compile(r"pagemap-([0-9]+)\.img")

Kept = tuple[Pages, int]  # an entry that stays, and the page of the pages file where it lies


def drop_zero_pages(directory: str) -> int:
    """Take the zero pages of private anonymous memory out of a complete image; returns the bytes.

    Raises OSError and BadImage; the image is of no use then.
    """
    pids = [found[1] for name in os.listdir(directory) if (found := _PAGEMAP.fullmatch(name))]
    with ThreadPoolExecutor(threads(), "llmux-pages") as pool:
        return sum(pool.map(lambda pid: _of_process(directory, pid), pids))


def _of_process(directory: str, pid: str) -> int:
    path = os.path.join(directory, f"pagemap-{pid}.img")
    pagemap = _read(path)
    number, entries = read_pagemap(pagemap)
    memory = anonymous_memory(_read(os.path.join(directory, f"mm-{pid}.img")))
    fd = os.open(os.path.join(directory, f"pages-{number}.img"), os.O_RDWR | os.O_CLOEXEC)
    try:
        kept = list(_kept(fd, entries, memory))
        before = sum(entry.count for entry in entries if entry.stored)
        after = sum(entry.count for entry, _ in kept if entry.stored)
        # CRIU looks at the first entry before it asks whether there is one.
        if after == before or not after:
            return 0
        place = 0
        for entry, page in kept:
            if entry.stored:
                _move(fd, page, place, entry.count)
                place += entry.count
        os.ftruncate(fd, after * PAGE_SIZE)
    finally:
        os.close(fd)
    with open(path, "wb") as file:
        file.write(write_pagemap(pagemap, (entry for entry, _ in kept)))
    return (before - after) * PAGE_SIZE


def _kept(fd: int, entries: Iterable[Pages], memory: list[tuple[int, int]]) -> Iterator[Kept]:
    """What stays of ``entries``; what does not are runs of LEAST zero pages or more."""
    page = 0
    for entry in entries:
        if not entry.stored:
            yield entry, page
            continue
        start = 0  # the first page that is neither kept nor dropped yet
        runs = _zero_runs(fd, page, _overlaps(entry, memory))
        for first, last in chain(runs, [(entry.count, entry.count)]):
            if first > start:
                yield entry.part(entry.start + start * PAGE_SIZE, first - start), page + start
            start = last
        page += entry.count


def _overlaps(entry: Pages, memory: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the pages of ``entry`` that lie in one of the mappings."""
    end = entry.start + entry.count * PAGE_SIZE
    begin = bisect_right(memory, entry.start, key=itemgetter(1))
    for start, stop in islice(memory, begin, None):
        if start >= end:
            break
        first, last = max(start, entry.start), min(stop, end)
        yield (first - entry.start) // PAGE_SIZE, (last - entry.start) // PAGE_SIZE


def _zero_runs(fd: int, page: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the runs of zero pages within ``ranges``, which count from ``page``."""
    for begin, end in ranges:
        start = begin
        for zero, group in groupby(_are_zero(fd, page + begin, end - begin)):
            last = start + sum(1 for _ in group)
            if zero and last - start >= LEAST:
                yield start, last
            start = last


def _are_zero(fd: int, page: int, count: int) -> Iterator[bool]:
    buffer = bytearray(_PIECE * PAGE_SIZE)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        _read_pages(fd, memoryview(buffer)[: size * PAGE_SIZE], page + start)
        for offset in range(0, size * PAGE_SIZE, PAGE_SIZE):
            # Compares in place, and only up to the first byte that is not zero.
            yield buffer.startswith(_ZERO, offset)


def _move(fd: int, page: int, place: int, count: int) -> None:
    """Copy ``count`` pages to a place before them, which may overlap."""
    if page == place:
        return
    buffer = memoryview(bytearray(_PIECE * PAGE_SIZE))
    for start in range(0, count, _PIECE):
        piece = buffer[: min(_PIECE, count - start) * PAGE_SIZE]
        _read_pages(fd, piece, page + start)
        offset, written = (place + start) * PAGE_SIZE, 0
        while written < len(piece):
            written += os.pwrite(fd, piece[written:], offset + written)


def _read_pages(fd: int, buffer: memoryview, page: int) -> None:
    offset, have = page * PAGE_SIZE, 0
    while have < len(buffer):
        count = os.preadv(fd, [buffer[have:]], offset + have)
        if not count:
            raise BadImage("a pages file is shorter than its pagemap says")
        have += count


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
