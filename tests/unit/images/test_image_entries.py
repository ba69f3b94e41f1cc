"""CRIU's image files read byte by byte: what is in them, and what is none."""

from __future__ import annotations

import os
import pathlib
from threading import Event

import pytest

from llmux.drivers.criu import command, image_format
from llmux.drivers.criu.image_format import BadImage, anonymous_memory, fields, read_pagemap
from llmux.drivers.criu.zero_pages import _PIECE, LEAST, drop_zero_pages
from llmux.drivers.images.files import Stopped

PAGE = 4096


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def text(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def image(*entries: bytes) -> bytes:
    return b"MAGICNUM" + b"".join(len(one).to_bytes(4, "little") + one for one in entries)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 16384, 2**32, 2**63, 2**64 - 1])
def test_a_number_of_any_length_comes_back(value: int) -> None:
    data = number(3, value)
    assert list(fields(data)) == [(3, value, data)]
    assert image_format._encode_varint(value) == varint(value)
    assert image_format._varint(varint(value) + b"x", 0) == (value, len(varint(value)))


def test_fields_of_every_kind_come_in_order_with_their_bytes() -> None:
    parts = [
        number(1, 5), text(200, b"name"), varint(9 << 3 | 1) + b"12345678",
        varint(10 << 3 | 5) + b"abcd", text(2, b""),
    ]  # fmt: skip
    found = list(fields(b"".join(parts)))
    assert [field for field, _, _ in found] == [1, 200, 9, 10, 2]
    assert [value for _, value, _ in found] == [5, b"name", b"12345678", b"abcd", b""]
    assert [raw for _, _, raw in found] == parts


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80", "a number is cut short"),
        (b"\xff" * 11 + b"\x01", "a number is cut short"),
        (text(1, b"long")[:-1], "a field is cut short"),
        (varint(9 << 3 | 1) + b"1234567", "a field is cut short"),
        (varint(9 << 3 | 5) + b"123", "a field is cut short"),
        (varint(9 << 3 | 3), "unknown wire type 3"),
        (varint(9 << 3 | 7), "unknown wire type 7"),
    ],
)
def test_a_message_that_is_cut_or_strange_is_none(data: bytes, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        list(fields(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no magic number"),
        (b"MAGICNU", "no magic number"),
        (b"MAGICNUM\x01\x00\x00", "a length is cut short"),
        (image(b"abc")[:-1], "an entry is cut short"),
    ],
)
def test_a_file_that_is_cut_is_none(data: bytes, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        list(image_format.entries(data))
    assert list(image_format.entries(image(b"abc", b"", b"d"))) == [b"abc", b"", b"d"]
    assert list(image_format.entries(image(b"abc", b""))) == [b"abc", b""]
    assert list(image_format.entries(image())) == []


def file(ident: int, *name: bytes) -> bytes:
    """An entry of files.img; without a name one of another kind."""
    reg = [text(3, number(1, 9) + text(6, one)) for one in name]
    return number(1, 1) + number(2, ident) + b"".join(reg)


FILES = image(
    file(1, b"/tmp/a"), file(2, b"dev/shm/link_remap.12"), file(3), file(40, b"/srv/link_remap.1x"),
    file(31, b"link_remap.7"), text(3, text(6, b"/no/id")), number(2, 6) + number(3, 7),
    file(7, b"\xff"),
)  # fmt: skip


def test_files_have_names_by_their_number() -> None:
    assert image_format.file_names(FILES) == {
        1: "/tmp/a", 2: "/dev/shm/link_remap.12", 40: "/srv/link_remap.1x", 31: "/link_remap.7",
        7: "/\udcff",
    }  # fmt: skip


def test_links_alone_are_renamed_and_all_else_stays() -> None:
    data, renamed = image_format.rename_links(FILES, "tok")
    assert renamed == {
        "/dev/shm/link_remap.12": "/dev/shm/link_remap.12.tok",
        "/link_remap.7": "/link_remap.7.tok",
    }
    assert data == image(
        file(1, b"/tmp/a"), file(2, b"dev/shm/link_remap.12.tok"), file(3),
        file(40, b"/srv/link_remap.1x"), file(31, b"link_remap.7.tok"), text(3, text(6, b"/no/id")),
        number(2, 6) + number(3, 7), file(7, b"\xff"),
    )  # fmt: skip


def remap(*values: int) -> bytes:
    return b"".join(number(field, value) for field, value in enumerate(values, 1))


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (remap(1, 255, 1), {"/tmp/a": "/tmp/a.cr.ff.ghost"}),
        (remap(1, 2, 0), {"/tmp/a": "/tmp/a"}),
        (remap(1, 2), {"/tmp/a": "/tmp/a"}),
        (remap(1, 2, 2), {}),  # a dead process's, with no file
        (remap(3, 2, 1), {}),
        (remap(99, 2, 1), {}),
        (number(1, 1), {}),
        (number(2, 1), {}),
    ],
)
def test_what_a_killed_restore_leaves_is_known(entry: bytes, found: dict[str, str]) -> None:
    assert image_format.remapped_names(FILES, image(entry)) == found


def vma(start: int, end: int, flags: int, status: int) -> bytes:
    values = ((1, start), (2, end), (6, flags), (7, status))
    return text(14, b"".join(number(field, value) for field, value in values))


ANON, REGULAR, HEAP, PRIVATE = 0x22, 1, 1 << 5, 1 << 9


@pytest.mark.parametrize(
    ("flags", "status", "plain"),
    [
        (ANON, REGULAR | PRIVATE, True),
        (ANON, REGULAR | PRIVATE | HEAP, True),
        (ANON, PRIVATE, True),
        (0x20, PRIVATE, True),
        (0x02, REGULAR | PRIVATE, False),
        (ANON, REGULAR, False),
        (ANON, REGULAR | PRIVATE | 1 << 1, False),
        (ANON, REGULAR | PRIVATE | 1 << 6, False),
        (ANON | 0x100, REGULAR | PRIVATE, False),
        (ANON | 0x40000, REGULAR | PRIVATE, False),
    ],
)
def test_plain_memory_is_told_from_all_else(flags: int, status: int, plain: bool) -> None:
    other = vma(0x9000, 0xA000, ANON, PRIVATE)
    strange = text(13, other[2:])  # of another field
    mm = image(number(1, 7) + strange + other + number(14, 3) + vma(0x1000, 0x3000, flags, status))
    expected = [(0x1000, 0x3000)] if plain else []
    assert anonymous_memory(mm) == [*expected, (0x9000, 0xA000)]
    assert anonymous_memory(image(text(14, number(6, ANON) + number(7, PRIVATE)))) == [(0, 0)]


def test_processes_have_threads_packed_or_not() -> None:
    data = image(
        number(1, 7) + number(5, 9) + number(5, 8) + number(2, 1),
        number(1, 300) + text(5, varint(301) + varint(300) + varint(400)),
        number(1, 5),
    )
    found = image_format.dumped_processes(data)
    assert found == {7: (7, 8, 9), 300: (300, 301, 400), 5: (5,)}
    with pytest.raises(BadImage, match="without pid"):
        image_format.dumped_processes(image(number(2, 7)))
    for core in (image(text(3, number(6, 1))), image(number(3, 1)), image(text(3, b""))):
        with pytest.raises(BadImage, match="without a name"):
            image_format.dumped_name(core)
    assert image_format.dumped_name(image(text(3, text(6, b"a\xff")))) == "a\ufffd"


def test_a_pagemap_without_a_head_is_none() -> None:
    for data in (image(), image(text(1, b"x"))):
        with pytest.raises(BadImage, match="no pagemap head"):
            read_pagemap(data)
    data = image(number(1, 3), number(1, PAGE) + number(2, 5), number(2, 2) + number(4, 1))
    assert read_pagemap(data)[1][1].start == 0
    (none,) = read_pagemap(image(number(1, 3), number(1, PAGE) + number(4, 4)))[1]
    assert (none.start, none.count, none.stored) == (PAGE, 0, True)
    assert image_format.stored_pages(data) == (3, 5 * PAGE)
    rest = image_format.write_pagemap(data, read_pagemap(data)[1][1:])
    assert rest == image(number(1, 3), number(2, 2) + number(4, 1))


def test_a_part_of_an_entry_has_its_own_place_and_number() -> None:
    entry = number(1, 5 * PAGE) + number(2, 0) + number(5, 9) + number(4, 4) + text(8, b"x")
    (pages,) = read_pagemap(image(number(1, 3), entry))[1]
    part = pages.part(7 * PAGE, 2)
    assert (part.start, part.count, part.stored) == (7 * PAGE, 2, True)
    assert part.message == (
        number(1, 7 * PAGE) + number(2, 0) + number(5, 2) + number(4, 4) + text(8, b"x")
    )


@pytest.mark.parametrize("zeros", [LEAST - 1, LEAST, _PIECE - 1, _PIECE, 2 * _PIECE + 1])
@pytest.mark.parametrize("others", [1, _PIECE, _PIECE + 1, 2 * _PIECE + 3])
def test_pages_move_down_over_zeros_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, zeros: int, others: int
) -> None:
    """More and fewer than are moved at once, and places that overlap."""
    kept = [n.to_bytes(4, "little") * (PAGE // 4) for n in range(1, others + 2)]
    count = zeros + others + 1
    pagemap = image(number(1, 2), number(1, 16 * PAGE) + number(2, count) + number(4, 4))
    (tmp_path / "pagemap-7.img").write_bytes(pagemap)
    (tmp_path / "mm-7.img").write_bytes(
        image(vma(16 * PAGE, (16 + count) * PAGE, ANON, PRIVATE | REGULAR))
    )
    pages = tmp_path / "pages-2.img"
    pages.write_bytes(kept[0] + bytes(zeros * PAGE) + b"".join(kept[1:]))
    written: list[int] = []
    real = os.pwrite

    def write(fd: int, piece: memoryview, offset: int) -> int:
        written.append(offset)
        return real(fd, piece, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", write)
        dropped = drop_zero_pages(str(tmp_path), Event())
    assert 0 not in written, "what stays in its place is not written"
    assert dropped == (zeros * PAGE if zeros >= LEAST else 0)
    _, entries = read_pagemap((tmp_path / "pagemap-7.img").read_bytes())
    if zeros < LEAST:
        assert [(entry.start, entry.count) for entry in entries] == [(16 * PAGE, count)]
    else:
        assert [(entry.start, entry.count) for entry in entries] == [
            (16 * PAGE, 1), ((17 + zeros) * PAGE, others),
        ]  # fmt: skip
        assert pages.read_bytes() == b"".join(kept)


class StopsLater(Event):
    """Is set once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_deadline_ends_it_at_every_entry_before_and_after_it_has_changed_anything(
    tmp_path: pathlib.Path,
) -> None:
    entries = [number(1, (16 + at * 40) * PAGE) + number(2, 40) + number(4, 4) for at in range(3)]
    pagemap = image(number(1, 2), *entries)
    (tmp_path / "mm-7.img").write_bytes(
        image(vma(16 * PAGE, (16 + 120) * PAGE, ANON, PRIVATE | REGULAR))
    )
    pages = tmp_path / "pages-2.img"
    stored = b"".join(bytes([at]) * PAGE + bytes(39 * PAGE) for at in (1, 2, 3))
    for looks in range(7):
        (tmp_path / "pagemap-7.img").write_bytes(pagemap)
        pages.write_bytes(stored)
        stop = StopsLater(looks)
        if looks == 6:  # once an entry to see what stays, once an entry to move it
            assert drop_zero_pages(str(tmp_path), stop) == 3 * 39 * PAGE
            assert pages.read_bytes() == b"".join(bytes([at]) * PAGE for at in (1, 2, 3))
            continue
        with pytest.raises(Stopped):
            drop_zero_pages(str(tmp_path), stop)
        assert stop.looks == -1
        assert (tmp_path / "pagemap-7.img").read_bytes() == pagemap
        assert pages.stat().st_size == len(stored)
        if looks < 4:
            assert pages.read_bytes() == stored


# ---- CRIU's words --------------------------------------------------------------------------------


def test_of_many_errors_the_first_and_the_last_are_said() -> None:
    def log(*words: str) -> str:
        return "".join(f"(00.01) 7: Error (criu/x.c:7): {word}\n(00.02) fine\n" for word in words)

    assert command.excerpt("") == ""
    assert command.excerpt(log("a")) == "a"
    assert command.excerpt(log("a", "b", "c")) == "a; b; c"
    assert command.excerpt(log("a", "b", "c", "d")) == "a; b; d"
    assert command.excerpt(log("a", "a", "b", "a")) == "a"
    assert command.excerpt(log("a", "b", "c"), limit=2) == "a; c"
    harmless = "rlimit: Can't setup RLIMIT_NOFILE for self"
    assert command.excerpt(log(harmless, "b")) == "b"
    assert command.missing_features("--a --b", ["--a", "--c", "--b", "--d"]) == ["--c", "--d"]
    assert command.missing_features(" ".join(command.WANTED), command.WANTED) == []


def test_each_option_that_a_dump_or_a_restore_needs_is_given() -> None:
    dump = command.dump_arguments("/c", 7, "/i", "/l")
    assert dump[:4] == ["/c", "dump", "--tree", "7"]
    restore = command.restore_arguments("/c", "/i", "/w", "/l")
    assert restore[:2] == ["/c", "restore"]
    common = {
        "--tcp-established", "--skip-in-flight", "--ext-unix-sk", "--file-locks", "--link-remap",
        "-v4", "--no-default-config",
    }  # fmt: skip
    for argv, work, log in ((dump, "/i", "dump.log"), (restore, "/w", "restore.log")):
        assert common <= set(argv)
        values = {word: argv[at + 1] for at, word in enumerate(argv[:-1]) if word.startswith("--")}
        assert (values["--images-dir"], values["--work-dir"]) == ("/i", work)
        assert (values["--log-file"], values["--libdir"]) == (log, "/l")
    assert "--freeze-cgroup" not in dump
    assert dump[dump.index("--ghost-limit") + 1] == "1G"
    assert dump[dump.index("--timeout") + 1] == "30"
    assert restore[-1] == "--leave-stopped"
    assert restore[restore.index("--pidfile") + 1] == "/w/root.pid"
    assert set(command.WANTED) == {
        "--link-remap", "--skip-in-flight", "--network-lock", "--manage-cgroups",
        "--no-default-config", "--ghost-limit", "--freeze-cgroup",
    }  # fmt: skip
