"""The few parts of CRIU's image files that we must understand: pure functions over bytes.

An image file is two 32-bit magic numbers, then entries of a 32-bit length and a protobuf message
(criu/include/magic.h, criu/protobuf.c). Messages are read field by field and unknown fields are
passed through unchanged, so newer CRIU versions do not disturb us.

Why we rewrite one: CRIU gives a deleted file that still has another name (every named semaphore of
Python's multiprocessing) a hard link ``link_remap.N`` beside it, and N is counted from the start in
every dump. Two images that are restored in turns would use the same names in /dev/shm (criu#2681).
So each image's links get names of their own right after the dump.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

FILES: Final = "files.img"
REMAPS: Final = "remap-fpath.img"
PAGE_SIZE: Final = 4096
_LINK: Final = re.compile(rb"(?:^|/)link_remap\.[0-9]+$")
_PE_PRESENT: Final = 1 << 2  # criu/include/pagemap.h: the page's bytes are in the pages file

# protobuf wire types
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class BadImage(ValueError):
    """Not a CRIU image file, or cut short."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BadImage("a number is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """(field number, value, raw bytes of the whole field) of a protobuf message, in order."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == _VARINT:
            value, at = _varint(message, at)
        elif wire == _BYTES:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif wire in (_FIXED64, _FIXED32):
            width = 8 if wire == _FIXED64 else 4
            value, at = message[at : at + width], at + width
        else:
            raise BadImage(f"unknown wire type {wire}")
        if at > len(message):
            raise BadImage("a field is cut short")
        yield number, value, message[start:at]


def entries(data: bytes) -> Iterator[bytes]:
    """The messages of an image file."""
    if len(data) < 8:
        raise BadImage("no magic number")
    at = 8
    while at < len(data):
        if at + 4 > len(data):
            raise BadImage("a length is cut short")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise BadImage("an entry is cut short")
        yield data[at : at + length]
        at += length


def _first_entry(data: bytes) -> bytes:
    for entry in entries(data):
        return entry
    raise BadImage("no entry")


def _with_bytes(message: bytes, number: int, value: bytes) -> bytes:
    """``message`` with the bytes of one field replaced."""
    out = bytearray()
    for have, _, raw in fields(message):
        if have == number:
            raw = _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value
        out += raw
    return bytes(out)


def _first(message: bytes, number: int) -> int | bytes | None:
    return next((value for have, value, _ in fields(message) if have == number), None)


# file_entry.reg = 3, reg_file_entry.name = 6 (criu/images/fdinfo.proto, regfile.proto)
_REG, _NAME = 3, 6


def rename_links(data: bytes, token: str) -> tuple[bytes, dict[str, str]]:
    """files.img with ``link_remap.N`` called ``link_remap.N.<token>``; returns old → new paths.

    Paths are absolute, though CRIU stores them without the leading slash.
    """
    out = bytearray(data[:8])
    renamed: dict[str, str] = {}
    for entry in entries(data):
        reg = _first(entry, _REG)
        name = _first(reg, _NAME) if isinstance(reg, bytes) else None
        if isinstance(reg, bytes) and isinstance(name, bytes) and _LINK.search(name):
            new = name + b"." + token.encode()
            old_path, new_path = (
                "/" + part.decode("utf-8", "surrogateescape").lstrip("/") for part in (name, new)
            )
            renamed[old_path] = new_path
            entry = _with_bytes(entry, _REG, _with_bytes(reg, _NAME, new))
        out += struct.pack("<I", len(entry)) + entry
    return bytes(out), renamed


def file_names(files: bytes) -> dict[int, str]:
    """id → path of the files in files.img: open ones, programs, mapped ones, directories."""
    names: dict[int, str] = {}
    for entry in entries(files):
        reg, number = _first(entry, _REG), _first(entry, 2)
        name = _first(reg, _NAME) if isinstance(reg, bytes) else None
        if isinstance(name, bytes) and isinstance(number, int):
            names[number] = "/" + name.decode("utf-8", "surrogateescape").lstrip("/")
    return names


def remapped_names(files: bytes, remaps: bytes) -> dict[str, str]:
    """Path of each file that had lost its name → path that a CRIU killed in a restore may leave.

    For a deleted file it makes ``NAME.cr.ID.ghost``, for a linked one it links NAME for a moment
    (criu/files-reg.c: ghost_path, rfi_remap); what is left makes the next restore fail.
    remap_file_path_entry: orig_id = 1, remap_id = 2, remap_type = 3 (0 linked, 1 ghost);
    file_entry.id = 2.
    """
    names = file_names(files)
    found: dict[str, str] = {}
    for entry in entries(remaps):
        original, remap, kind = (_first(entry, number) for number in (1, 2, 3))
        if isinstance(original, int) and isinstance(remap, int) and original in names:
            path = names[original]
            if kind == 1:
                found[path] = f"{path}.cr.{remap:x}.ghost"
            elif not kind:
                found[path] = path
    return found


@dataclass(frozen=True, slots=True)
class Pages:
    """An entry of a pagemap: ``count`` pages from address ``start`` on. ``stored``: their bytes are
    in the pages file, right behind those of the stored entry before."""

    start: int
    count: int
    stored: bool
    message: bytes

    def part(self, start: int, count: int) -> Self:
        """The entry of some of these pages."""
        message = bytearray()
        for number, value, raw in fields(self.message):
            new = {_VADDR: start, _NR_PAGES_32: count, _NR_PAGES: count}.get(number)
            # CRIU 4.2 has two fields for the number of pages and uses one.
            if new is not None and value:
                raw = _encode_varint(number << 3 | _VARINT) + _encode_varint(new)
            message += raw
        return replace(self, start=start, count=count, message=bytes(message))


# criu/images/pagemap.proto: of pagemap_head pages_id = 1, of pagemap_entry the rest
_PAGES_ID, _VADDR, _NR_PAGES_32, _IN_PARENT, _FLAGS, _NR_PAGES = 1, 1, 2, 3, 4, 5


def read_pagemap(data: bytes) -> tuple[int, list[Pages]]:
    """(number N of the pages-N.img, entries) of a pagemap-PID.img."""
    messages = list(entries(data))
    if not messages or not isinstance(number := _first(messages[0], _PAGES_ID), int):
        raise BadImage("no pagemap head")
    found = []
    for message in messages[1:]:
        values = {key: value for key, value, _ in fields(message) if isinstance(value, int)}
        count = values.get(_NR_PAGES) or values.get(_NR_PAGES_32, 0)
        flags = values.get(_FLAGS)
        # Very old images have no flags and mean "present unless in the parent image".
        stored = not values.get(_IN_PARENT) if flags is None else bool(flags & _PE_PRESENT)
        found.append(Pages(values.get(_VADDR, 0), count, stored, message))
    return number, found


def write_pagemap(data: bytes, pages: Iterable[Pages]) -> bytes:
    """``data``, a pagemap-PID.img, with other entries."""
    (length,) = struct.unpack_from("<I", data, 8)
    out = bytearray(data[: 12 + length])
    for entry in pages:
        out += struct.pack("<I", len(entry.message)) + entry.message
    return bytes(out)


def stored_pages(pagemap: bytes) -> tuple[int, int]:
    """(number N of the pages-N.img, bytes that it must have) for a pagemap-PID.img."""
    number, pages = read_pagemap(pagemap)
    return number, sum(entry.count for entry in pages if entry.stored) * PAGE_SIZE


# mm_entry.vmas = 14; vma_entry: start = 1, end = 2, flags = 6, status = 7 (criu/images/mm.proto,
# vma.proto; the bits of the status: criu/include/image.h)
_VMAS, _START, _END, _MMAP_FLAGS, _STATUS = 14, 1, 2, 6, 7
_REGULAR, _HEAP, _ANON_PRIVATE = 1 << 0, 1 << 5, 1 << 9
_ANYTHING_ELSE: Final = ~(_REGULAR | _HEAP | _ANON_PRIVATE)
_MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_HUGETLB = 0x20, 0x100, 0x40000


def anonymous_memory(mm: bytes) -> list[tuple[int, int]]:
    """(start, end) of the plain private anonymous mappings in an mm-PID.img, in order: a page of
    theirs that is in no pagemap is zero in the restored process. Stacks, huge pages and whatever
    has a bit that we do not know are left out."""
    found = []
    for number, value, _ in fields(_first_entry(mm)):
        if number != _VMAS or not isinstance(value, bytes):
            continue
        vma = {key: number for key, number, _ in fields(value) if isinstance(number, int)}
        status, flags = vma.get(_STATUS, 0), vma.get(_MMAP_FLAGS, 0)
        if (
            status & _ANON_PRIVATE
            and not status & _ANYTHING_ELSE
            and flags & _MAP_ANONYMOUS
            and not flags & (_MAP_GROWSDOWN | _MAP_HUGETLB)
        ):
            found.append((vma.get(_START, 0), vma.get(_END, 0)))
    return sorted(found)


def dumped_processes(pstree: bytes) -> dict[int, tuple[int, ...]]:
    """pid → thread ids, as CRIU dumped them (pstree_entry: pid = 1, threads = 5, packed or not)."""
    found = {}
    for entry in entries(pstree):
        pid = _first(entry, 1)
        if not isinstance(pid, int):
            raise BadImage("a process without pid")
        threads: list[int] = []
        for number, value, _ in fields(entry):
            if number != 5:
                continue
            if isinstance(value, int):
                threads.append(value)
            else:
                at = 0
                while at < len(value):
                    thread, at = _varint(value, at)
                    threads.append(thread)
        found[pid] = tuple(sorted({pid, *threads}))
    return found


def dumped_name(core: bytes) -> str:
    """The name of a process (criu/images/core.proto: core_entry.tc = 3, tc.comm = 6)."""
    tc = _first(_first_entry(core), 3)
    comm = _first(tc, 6) if isinstance(tc, bytes) else None
    if not isinstance(comm, bytes):
        raise BadImage("a process without a name")
    return comm.decode(errors="replace")
