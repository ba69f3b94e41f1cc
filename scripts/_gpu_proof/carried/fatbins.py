"""CUDA's code in a library, for one architecture only.

``.nv_fatbin`` of a library is a row of fat binaries, each with one entry per architecture, and the
driver takes the entry that fits its GPU by the entry's header. The payload of every other entry is
zeroed here: sizes and places stay as they are, and what is zero packs to nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
CUBIN = 2  # an entry's kind; 1 is PTX, which the driver compiles where no cubin fits
# magic, version, size of this header, size of the entries after it
FATBIN = struct.Struct("<IHHQ")
# kind, its version, size of this header, size of the payload, and up to the architecture: its size
# compressed, size of options, minor, major
ENTRY = struct.Struct("<HHIQIIHHI")


class BadLibraryError(Exception):
    """It is no ELF64 file, or its fat binaries are not what they were in CUDA 13."""


def keep_only(library: bytearray, architecture: int) -> tuple[int, int]:
    """Zero the payloads of other architectures, and of PTX. (bytes kept, bytes zeroed)."""
    kept = zeroed = 0
    for start, end in _sections(library):
        for kind, arch, first, last in _entries(library, start, end):
            if kind == CUBIN and arch == architecture:
                kept += last - first
            else:
                library[first:last] = bytes(last - first)
                zeroed += last - first
    return kept, zeroed


def architectures(library: bytes) -> dict[tuple[int, int], int]:
    """Bytes of payload by (kind, architecture)."""
    found: dict[tuple[int, int], int] = {}
    for start, end in _sections(library):
        for kind, arch, first, last in _entries(library, start, end):
            found[kind, arch] = found.get((kind, arch), 0) + last - first
    return found


def _sections(library: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(start, end) of the sections with fat binaries."""
    if library[:5] != b"\x7fELF\x02":
        raise BadLibraryError("no ELF64 file")
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names_index = struct.unpack_from("<3H", library, 58)

    def section(index: int) -> tuple[int, int, int]:
        name, offset, length = struct.unpack_from("<I20x2Q", library, table + index * size)
        return name, offset, length

    _, names, _ = section(names_index)
    for index in range(count):
        name, offset, length = section(index)
        end = library.index(b"\0", names + name)
        if library[names + name : end] == SECTION:
            yield offset, offset + length


def _entries(
    library: bytes | bytearray, start: int, end: int
) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, start and end of the payload) of all entries of all fat binaries."""
    at = start
    while at + FATBIN.size <= end:
        magic, _, header, size = FATBIN.unpack_from(library, at)
        if magic != MAGIC:
            if any(library[at : at + 8]):
                raise BadLibraryError(f"no fat binary at {at:#x}")
            at += 8  # they are aligned
            continue
        entry, last = at + header, at + header + size
        if last > end:
            raise BadLibraryError(f"the fat binary at {at:#x} is longer than its section")
        while entry < last:
            kind, _, entry_header, length, _, _, _, _, arch = ENTRY.unpack_from(library, entry)
            payload = entry + entry_header
            if not entry_header or payload + length > last:
                raise BadLibraryError(f"an entry at {entry:#x} is longer than its fat binary")
            yield kind, arch, payload, payload + length
            entry = payload + length
        at = last
