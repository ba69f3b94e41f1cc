"""Remove zero pages from an image right after the dump.

CRIU stores every page that a process has touched. Those of a zeroed KV cache cost a restore as much
as any others: read, copied, and memory for each. A page of a private anonymous mapping that is in
no pagemap is one that the process never touched, which reads as zero; so it was before the dump and
so it is afterwards. A child of a fork that shares the mapping is no exception: CRIU drops what the
parent has and the child's pagemap lacks (criu/mem.c: restore_priv_vma_content).

The pages file is one sequence without addresses, so what stays moves down within it. The image has
no manifest yet: an interruption here leaves one that was never complete.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from operator import itemgetter
from threading import Event
from typing import Final

from llmux.drivers.criu.image_format import (
    PAGE_SIZE,
    BadImage,
    Pages,
    anonymous_memory,
    read_pagemap,
    write_pagemap,
)
from llmux.drivers.images.files import Stopped, read_exactly, threads

# Fewer zero pages than this stay: each gap makes an entry more, and a read that is cut in two.
LEAST: Final = 16
_PIECE: Final = 64  # pages; stays in the level-2 cache
_ZERO: Final = bytes(PAGE_SIZE)
_PAGEMAP: Final = re.compile(r"pagemap-([0-9]+)\.img")

Kept = tuple[Pages, int]  # an entry that stays, and the page of the pages file where it lies


def drop_zero_pages(directory: str, stop: Event) -> int:
    """Take the zero pages of private anonymous memory out of a complete image; returns the bytes.

    Raises OSError, BadImage, and Stopped soon after ``stop`` was set; the image is useless then.
    """
    pids = [found[1] for name in os.listdir(directory) if (found := _PAGEMAP.fullmatch(name))]
    with ThreadPoolExecutor(threads(), "llmux-pages") as pool:
        return sum(pool.map(lambda pid: _of_process(directory, pid, stop), pids))


def _of_process(directory: str, pid: str, stop: Event) -> int:
    path = os.path.join(directory, f"pagemap-{pid}.img")
    pagemap = _read(path)
    number, entries = read_pagemap(pagemap)
    memory = anonymous_memory(_read(os.path.join(directory, f"mm-{pid}.img")))
    fd = os.open(os.path.join(directory, f"pages-{number}.img"), os.O_RDWR | os.O_CLOEXEC)
    try:
        before = sum(entry.count for entry in entries if entry.stored)
        if os.fstat(fd).st_size < before * PAGE_SIZE:
            raise BadImage("a pages file is shorter than its pagemap says")
        kept = list(_kept(fd, entries, memory, stop))
        after = sum(entry.count for entry, _ in kept if entry.stored)
        # CRIU looks at the first entry before it asks whether there is one.
        if after == before or not after:
            return 0
        place = 0
        for entry, page in kept:
            _check(stop)
            if entry.stored:
                _move(fd, page, place, entry.count)
                place += entry.count
        os.ftruncate(fd, after * PAGE_SIZE)
    finally:
        os.close(fd)
    with open(path, "wb") as file:
        file.write(write_pagemap(pagemap, (entry for entry, _ in kept)))
    return (before - after) * PAGE_SIZE


def _check(stop: Event) -> None:
    if stop.is_set():
        raise Stopped


def _kept(
    fd: int, entries: Iterable[Pages], memory: list[tuple[int, int]], stop: Event
) -> Iterator[Kept]:
    """What stays of ``entries``; what does not are runs of LEAST zero pages or more."""
    page = 0
    for entry in entries:
        _check(stop)
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
        read_exactly(fd, memoryview(buffer)[: size * PAGE_SIZE], (page + start) * PAGE_SIZE)
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
        read_exactly(fd, piece, (page + start) * PAGE_SIZE)
        offset, written = (place + start) * PAGE_SIZE, 0
        while written < len(piece):
            written += os.pwrite(fd, piece[written:], offset + written)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
