"""Removing zero pages from an image does not change what a restore makes."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.drivers.criu.image_format import BadImage, read_pagemap, stored_pages
from llmux.drivers.criu.zero_pages import LEAST, drop_zero_pages
from llmux.drivers.images.files import Stopped

PAGE = 4096
BASE = 0x7F0000000000
PRESENT, IN_PARENT = 4, 1  # flags of a pagemap's entry
MAP_PRIVATE, MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_HUGETLB = 0x02, 0x20, 0x100, 0x40000
REGULAR, STACK, HEAP, FILE_PRIVATE, ANON_PRIVATE, SHADOW_STACK = (
    1 << bit for bit in (0, 1, 5, 6, 9, 15)
)
ANONYMOUS = (MAP_PRIVATE | MAP_ANONYMOUS, REGULAR | ANON_PRIVATE)
BRK = (MAP_PRIVATE | MAP_ANONYMOUS, REGULAR | ANON_PRIVATE | HEAP)
# An absent page is not zero in these, or may not be.
OTHERS = (
    (MAP_PRIVATE, REGULAR | FILE_PRIVATE),
    (MAP_PRIVATE | MAP_ANONYMOUS, REGULAR),
    (MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, REGULAR | ANON_PRIVATE | STACK),
    (MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, REGULAR | ANON_PRIVATE),
    (MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, REGULAR | ANON_PRIVATE),
    (MAP_PRIVATE | MAP_ANONYMOUS, REGULAR | ANON_PRIVATE | SHADOW_STACK),
    (MAP_PRIVATE | MAP_ANONYMOUS, REGULAR | ANON_PRIVATE | 1 << 30),
)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def message(*numbers: tuple[int, int]) -> bytes:
    return b"".join(varint(field << 3) + varint(value) for field, value in numbers)


def image(*messages: bytes) -> bytes:
    return bytes(8) + b"".join(len(one).to_bytes(4, "little") + one for one in messages)


@dataclass(frozen=True)
class Mapping:
    flags: int
    status: int
    contents: Sequence[bytes | None]  # of each page; None: not touched

    @property
    def safe(self) -> bool:
        return (self.flags, self.status) in (ANONYMOUS, BRK)


@dataclass(frozen=True)
class Process:
    mappings: Sequence[Mapping]
    splits: frozenset[int]  # pages before which a new entry of the pagemap begins
    wide: bool  # the number of pages in CRIU 4.2's field

    def write(self, directory: pathlib.Path, pid: int) -> None:
        vmas, entries, stored = [], [], bytearray()
        page = 0
        run: list[int] = []

        def end_run() -> None:
            if run:
                count = ((2, 0), (5, len(run))) if self.wide else ((2, len(run)),)
                address = BASE + run[0] * PAGE
                entries.append(message((1, address), *count, (4, PRESENT)))
                run.clear()

        for mapping in self.mappings:
            start = page
            for content in mapping.contents:
                if content is None or page in self.splits:
                    end_run()
                if content is not None:
                    run.append(page)
                    stored += content
                page += 1
            vma = message(
                (1, BASE + start * PAGE), (2, BASE + page * PAGE), (3, 0), (4, 0), (5, 3),
                (6, mapping.flags), (7, mapping.status), (8, 1),
            )  # fmt: skip
            vmas.append(varint(14 << 3 | 2) + varint(len(vma)) + vma)
        end_run()
        entries.append(message((1, BASE + page * PAGE), (2, 7), (3, 1), (4, IN_PARENT)))
        mm = message((1, 0x400000), (12, 3)) + b"".join(vmas) + message((15, 1))
        (directory / f"mm-{pid}.img").write_bytes(image(mm))
        (directory / f"pagemap-{pid}.img").write_bytes(image(message((1, pid + 1)), *entries))
        (directory / f"pages-{pid + 1}.img").write_bytes(stored)


def restored(directory: pathlib.Path, pid: int) -> dict[int, bytes]:
    """address → page, of those in the pagemap, as a restore reads them one after the other."""
    number, entries = read_pagemap((directory / f"pagemap-{pid}.img").read_bytes())
    stored = (directory / f"pages-{number}.img").read_bytes()
    memory, at = {}, 0
    for entry in entries:
        if entry.stored:
            assert entry.count > 0
            for index in range(entry.count):
                memory[entry.start + index * PAGE] = stored[at : at + PAGE]
                at += PAGE
    assert at == len(stored)
    return memory


# Full of the number that it has, or zero, or zero but for its last byte.
PAGES = st.sampled_from(
    (None, bytes(PAGE), bytes(PAGE - 1) + b"\1", *(bytes([n]) * PAGE for n in (1, 2)))
)
RUNS = st.lists(st.tuples(PAGES, st.integers(1, 3 * LEAST)), min_size=1, max_size=5).map(
    lambda runs: [page for page, count in runs for _ in range(count)]
)
MAPPINGS = st.builds(
    lambda kind, contents: Mapping(kind[0], kind[1], contents),
    st.sampled_from((ANONYMOUS, ANONYMOUS, BRK, *OTHERS)),
    RUNS,
)
PROCESSES = st.builds(
    Process,
    st.lists(MAPPINGS, min_size=1, max_size=5),
    st.frozensets(st.integers(0, 300), max_size=10),
    st.booleans(),
)


@given(st.lists(PROCESSES, min_size=1, max_size=3))
def test_a_restore_makes_the_same_memory_of_it(processes: list[Process]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        for pid, process in enumerate(processes, 100):
            process.write(directory, pid)
        before = {pid: restored(directory, pid) for pid in range(100, 100 + len(processes))}
        dropped = drop_zero_pages(name, Event())
        after = {pid: restored(directory, pid) for pid in before}
        assert dropped == PAGE * sum(len(before[pid]) - len(after[pid]) for pid in before)
        for pid, process in enumerate(processes, 100):
            page = 0
            for mapping in process.mappings:
                addresses = range(
                    BASE + page * PAGE, BASE + (page + len(mapping.contents)) * PAGE, PAGE
                )
                page += len(mapping.contents)
                for address in addresses:
                    had, has = before[pid].get(address), after[pid].get(address)
                    if has != had:
                        assert mapping.safe
                        assert has is None
                        assert had == bytes(PAGE)
                if mapping.safe and any(map(any, before[pid].values())):
                    assert longest_zero_run(after[pid], addresses, process.splits) < LEAST
        assert drop_zero_pages(name, Event()) == 0


def longest_zero_run(memory: dict[int, bytes], addresses: range, splits: frozenset[int]) -> int:
    """Within one entry of the pagemap: runs are not looked for beyond it."""
    longest = run = 0
    for address in addresses:
        if (address - BASE) // PAGE in splits:
            run = 0
        run = run + 1 if memory.get(address) == bytes(PAGE) else 0
        longest = max(longest, run)
    return longest


def test_what_is_not_changed_is_not_written(tmp_path: pathlib.Path) -> None:
    Process([Mapping(*ANONYMOUS, [b"x" * PAGE] * 40)], frozenset(), False).write(tmp_path, 7)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert drop_zero_pages(str(tmp_path), Event()) == 0
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()
    }


def test_short_runs_stay(tmp_path: pathlib.Path) -> None:
    contents = [b"a" * PAGE] + [bytes(PAGE)] * (LEAST - 1) + [b"b" * PAGE]
    Process([Mapping(*ANONYMOUS, contents)], frozenset(), False).write(tmp_path, 7)
    assert drop_zero_pages(str(tmp_path), Event()) == 0


def test_what_is_in_no_pages_file_hides_nothing_behind_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:3000], at))  # may be so
    full, last = b"\1" * PAGE, bytes(range(256)) * (PAGE // 256)
    pages = [full, *[bytes(PAGE)] * LEAST, last]
    Process([Mapping(*ANONYMOUS, pages)], frozenset(), wide=False).write(tmp_path, 7)
    elsewhere = message((1, BASE - 9 * PAGE), (2, 7), (3, 1), (4, IN_PARENT))
    own = message((1, BASE), (2, len(pages)), (4, PRESENT))
    (tmp_path / "pagemap-7.img").write_bytes(image(message((1, 8)), elsewhere, own))
    assert drop_zero_pages(str(tmp_path), Event()) == LEAST * PAGE
    assert restored(tmp_path, 7) == {BASE: full, BASE + (LEAST + 1) * PAGE: last}
    _, entries = read_pagemap((tmp_path / "pagemap-7.img").read_bytes())
    assert [(entry.start, entry.count, entry.stored) for entry in entries] == [
        (BASE - 9 * PAGE, 7, False), (BASE, 1, True), (BASE + (LEAST + 1) * PAGE, 1, True),
    ]  # fmt: skip


def test_a_process_without_any_other_page_keeps_its_zeros(tmp_path: pathlib.Path) -> None:
    """CRIU looks at the first entry before it asks whether there is one."""
    Process([Mapping(*ANONYMOUS, [bytes(PAGE)] * 40)], frozenset(), False).write(tmp_path, 7)
    assert drop_zero_pages(str(tmp_path), Event()) == 0
    assert len(restored(tmp_path, 7)) == 40


def test_the_entries_are_those_of_criu_but_for_place_and_number(tmp_path: pathlib.Path) -> None:
    contents = [b"a" * PAGE] * 3 + [bytes(PAGE)] * LEAST + [b"b" * PAGE] * 2
    Process([Mapping(*ANONYMOUS, contents)], frozenset(), True).write(tmp_path, 7)
    assert drop_zero_pages(str(tmp_path), Event()) == LEAST * PAGE
    assert (tmp_path / "pagemap-7.img").read_bytes() == image(
        message((1, 8)),
        message((1, BASE), (2, 0), (5, 3), (4, PRESENT)),
        message((1, BASE + (3 + LEAST) * PAGE), (2, 0), (5, 2), (4, PRESENT)),
        message((1, BASE + len(contents) * PAGE), (2, 7), (3, 1), (4, IN_PARENT)),
    )


def test_a_pages_file_that_is_too_short_is_an_error(tmp_path: pathlib.Path) -> None:
    Process([Mapping(*ANONYMOUS, [bytes(PAGE)] * 40)], frozenset(), False).write(tmp_path, 7)
    with open(tmp_path / "pages-8.img", "r+b") as file:
        file.truncate(39 * PAGE)
    with pytest.raises(BadImage, match="shorter than its pagemap says"):
        drop_zero_pages(str(tmp_path), Event())


def test_it_ends_when_the_deadline_of_the_dump_passed(tmp_path: pathlib.Path) -> None:
    contents = [b"a" * PAGE] + [bytes(PAGE)] * LEAST
    Process([Mapping(*ANONYMOUS, contents)], frozenset(), False).write(tmp_path, 7)
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        drop_zero_pages(str(tmp_path), stop)


@pytest.mark.parametrize(
    ("entry", "stored"),
    [
        (((4, PRESENT),), True),
        (((4, PRESENT | 8),), True),  # lazy as well
        (((4, IN_PARENT),), False),
        (((4, 8),), False),
        (((3, 1), (4, PRESENT)), True),  # flags say it, where there are any
        ((), True),  # images older than flags: stored unless in the parent
        (((3, 0),), True),
        (((3, 1),), False),
    ],
)
def test_which_pages_an_image_has(entry: tuple[tuple[int, int], ...], stored: bool) -> None:
    data = image(message((1, 3)), message((1, 4096), (2, 5), *entry))
    number, (pages,) = read_pagemap(data)
    assert (number, pages.start, pages.count, pages.stored) == (3, 4096, 5, stored)
    assert stored_pages(data) == (3, 5 * 4096 * stored)
