"""An image as a stream: a tar archive of its header and of the segments of its files, in order.

A segment is what has a checksum of its own in the manifest, so each is verified as it arrives and a
stream that broke goes on with the first that is missing. Segments of zeros are left out: they are
holes. Only plain entries are read, each must be the next one that the header announces, and no name
in the archive becomes a path: files are made by the header's names, checked there.

::

    <images_dir>/<model>/.import/         the files, and the manifest once all are verified
                         .import.json     the header
                         .import.done     how many segments have arrived
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Event
from typing import IO, Final

from llmux.drivers.images.files import (
    SEGMENT,
    Counter,
    digest_files,
    digest_segment,
    first_difference,
    read_exactly,
    sync_tree,
)
from llmux.drivers.images.manifest import NAME as MANIFEST
from llmux.drivers.images.manifest import Manifest
from llmux.drivers.images.store import IMPORT
from llmux.drivers.transfer.header import MAX_BYTES, NAME, BadStream, Header
from llmux.errors import LlmuxError
from llmux.small_files import read_small, replace_small
from llmux.trusted import open_private

_BLOCK: Final = tarfile.BLOCKSIZE
_HEADER: Final = f"{IMPORT}.json"
_DONE: Final = f"{IMPORT}.done"
AGAIN: Final = "run the same command again: what has arrived is kept"


@dataclass(frozen=True, slots=True)
class Segment:
    number: int
    file: str
    start: int
    end: int
    checksum: int

    @property
    def name(self) -> str:
        return f"{self.file}/{self.start // SEGMENT:08d}"


def segments(manifest: Manifest) -> Iterator[Segment]:
    number = 0
    for file in manifest.files:
        for index, checksum in enumerate(file.sums):
            start = index * SEGMENT
            yield Segment(number, file.name, start, min(start + SEGMENT, file.size), checksum)
            number += 1


# ---- sending ------------------------------------------------------------------------------------


def send(
    header: Header, directory: str, out: IO[bytes], count: Counter, *, headed: bool = True
) -> None:
    """Write the stream from segment ``header.first`` on; ``headed``: with the header before it."""
    descriptors = _open_all(header.manifest, directory)
    nothing = bytes(SEGMENT)
    try:
        if headed:
            _entry(out, NAME, header.to_json())
        for segment in segments(header.manifest):
            length = segment.end - segment.start
            if segment.number >= header.first:
                data = bytearray(length)
                read_exactly(descriptors[segment.file], memoryview(data), segment.start)
                if not data.startswith(nothing[:length]):
                    _entry(out, segment.name, data)
            count(length)
    finally:
        for fd in descriptors.values():
            os.close(fd)
    out.write(bytes(2 * _BLOCK))
    out.flush()


def _open_all(manifest: Manifest, directory: str) -> dict[str, int]:
    """All at once: an image that is replaced meanwhile is sent to its end."""
    opened: dict[str, int] = {}
    try:
        for file in manifest.files:
            path = os.path.join(directory, file.name)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            opened[file.name] = os.open(path, flags)
            if (size := os.fstat(opened[file.name]).st_size) != file.size:
                raise LlmuxError(f"cannot export: {path} has {size} bytes, not {file.size}")
    except BaseException:
        for fd in opened.values():
            os.close(fd)
        raise
    return opened


def _entry(out: IO[bytes], name: str, data: bytes | bytearray) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    head = entry.tobuf(tarfile.USTAR_FORMAT)
    for part in (head, data, bytes(-len(data) % _BLOCK)):
        out.write(part)


# ---- receiving ----------------------------------------------------------------------------------


def receive_header(source: IO[bytes]) -> Header:
    """Raises BadStream."""
    entry = _next_entry(source)
    if entry is None or entry.name != NAME:
        raise BadStream("the input is not a stream of `llmux images export`")
    if entry.size > MAX_BYTES:
        raise BadStream(f"the head of the stream has {entry.size} bytes, {MAX_BYTES} at most")
    return Header.from_json(_content(source, entry.size))


def skip_entries(source: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The entries that follow; the source stands behind each, which is complete. Raises BadStream
    at one that is not."""
    while (entry := _next_entry(source)) is not None:
        source.seek(entry.size - 1, os.SEEK_CUR) if entry.size else None
        _read(source, (1 if entry.size else 0) + -entry.size % _BLOCK)
        yield entry


def _next_entry(source: IO[bytes]) -> tarfile.TarInfo | None:
    """None at the archive's end."""
    block = _read(source, _BLOCK)
    if not any(block):
        return None
    try:
        entry = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise BadStream(f"the stream is damaged: {error}", AGAIN) from error
    if entry.type != tarfile.REGTYPE or entry.linkname:
        raise BadStream(f"{entry.name[:100]!r} in the stream is not a plain file")
    if entry.size < 0:
        raise BadStream(f"{entry.name[:100]!r} in the stream has no size")
    return entry


def _content(source: IO[bytes], size: int) -> bytes:
    data = _read(source, size)
    _read(source, -size % _BLOCK)
    return data


def _read(source: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := source.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    if size:
        raise BadStream("the stream ended too early", AGAIN)
    return b"".join(parts)


class Import:
    """An import under way in a model's directory, which ``ImageStore.receive`` made safe."""

    def __init__(self, home: str) -> None:
        self._home = home
        self.directory = os.path.join(home, IMPORT)

    def received(self) -> tuple[str, int] | None:
        """(id of the image, segments that have arrived); None when nothing was begun."""
        try:
            text = read_small(os.path.join(self._home, _HEADER), MAX_BYTES, links=False)
            header = Header.from_json(text)
            done = int(read_small(os.path.join(self._home, _DONE), 32, links=False) or b"0")
        except (OSError, ValueError, BadStream):
            return None
        most = sum(len(file.sums) for file in header.manifest.files)
        return (header.id, done) if 0 <= done <= most and os.path.isdir(self.directory) else None

    def run(self, header: Header, source: IO[bytes], count: Counter) -> None:
        """Take the segments in, each verified, and in the end the whole. Raises BadStream."""
        done = self._begin(header)
        if header.first > done:
            raise BadStream(
                f"the stream begins with segment {header.first}, and {done} have arrived",
                "give export the --resume that `llmux images received` prints",
            )
        expected = iter([s for s in segments(header.manifest) if s.number >= header.first])
        root = open_private(self.directory)
        try:
            while (entry := _next_entry(source)) is not None:
                segment = self._match(entry, expected)
                self._write(root, segment, _content(source, entry.size))
                self._note(segment.number + 1)
                count(entry.size)
            self._require_holes(expected)
        finally:
            os.close(root)
        self._verify(header)

    def _begin(self, header: Header) -> int:
        known = self.received()
        if known is not None and known[0] == header.id:
            return known[1]
        self.forget()
        root = open_private(self.directory)
        try:
            for file in header.manifest.files:
                _make(root, file.name, file.size)
        finally:
            os.close(root)
        replace_small(os.path.join(self._home, _HEADER), replace(header, first=0).to_json())
        self._note(0)
        return 0

    def forget(self) -> None:
        for name in (_DONE, _HEADER):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._home, name))
        shutil.rmtree(self.directory, ignore_errors=True)

    def forget_notes(self) -> None:
        """The image was put in its place."""
        for name in (_DONE, _HEADER):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._home, name))

    @staticmethod
    def _match(entry: tarfile.TarInfo, expected: Iterator[Segment]) -> Segment:
        for segment in expected:
            if entry.name == segment.name:
                if entry.size != segment.end - segment.start:
                    raise BadStream(f"{entry.name} in the stream has {entry.size} bytes")
                return segment
            Import._require_hole(segment)
        raise BadStream(f"{entry.name[:100]!r} in the stream is not what comes next")

    @staticmethod
    def _require_hole(segment: Segment) -> None:
        if segment.checksum != 0:
            raise BadStream(f"{segment.name} is missing in the stream", AGAIN)

    def _require_holes(self, rest: Iterator[Segment]) -> None:
        for segment in rest:
            self._require_hole(segment)

    def _write(self, root: int, segment: Segment, data: bytes) -> None:
        fd = os.open(segment.file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(fd, memoryview(data)[written:], segment.start + written)
            if digest_segment(fd, segment.start, segment.end, True) != segment.checksum:
                raise BadStream(f"{segment.name} arrived damaged", AGAIN)
        finally:
            os.close(fd)

    def _note(self, done: int) -> None:
        replace_small(os.path.join(self._home, _DONE), str(done).encode())

    def _verify(self, header: Header) -> None:
        """All files once more: what arrived in an earlier run may have been lost since."""
        want = header.manifest.files
        names = [file.name for file in want]
        stop, count = Event(), lambda _: None
        have = digest_files(self.directory, names, punch=True, stop=stop, count=count)
        if difference := first_difference(want, have):
            self.forget()
            raise BadStream(difference, "run the export and the import again from the start")

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, last; everything is on disk when this returns."""
        path = os.path.join(self.directory, MANIFEST)
        with suppress(FileNotFoundError):
            os.unlink(path)
        sync_tree(self.directory)
        replace_small(path, manifest.to_json().encode())
        sync_tree(self.directory)


def _make(root: int, name: str, size: int) -> None:
    directory, _, _ = name.rpartition("/")
    if directory:
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700, dir_fd=root)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=root)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)
