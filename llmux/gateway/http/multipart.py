"""Multipart uploads: kept out of memory while they are received, searched for the model's name.

An upload is forwarded when it is complete: engines read a form to its end before they begin, so
this costs no time, a slow client occupies no engine, and the request can be repeated when an engine
dies.
"""

from __future__ import annotations

import os
import re
import tempfile

from llmux.gateway.http.json_finder import is_true

MEMORY_BYTES = 128 * 1024  # of one upload; a longer one is kept in an unlinked file
MAX_PART_HEAD = 16 * 1024
MAX_PARTS = 1000  # vLLM's server takes as many fields and files
MAX_MODEL = 1024
MAX_YES = 8  # bytes of a yes or no; a longer value is none

# On disk, where $TMPDIR names no other directory: /tmp is memory on many systems.
SPOOL_DIR = "/var/tmp"  # noqa: S108  # mkstemp, unlinked at once

_PARAMETER = re.compile(rb';\s*([^=;\s]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;]*)')
_MULTIPART = re.compile(rb"multipart/form-data\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)


class FormError(Exception):
    """The form cannot be read; the text says why."""


class Upload:
    """A body that grows by ``write`` and is read at any offset. Its file has no name and is closed
    with this object."""

    def __init__(self) -> None:
        self.size = 0
        self._patch = (0, 0, b"")  # (start, end, replacement)
        self._memory = bytearray()
        self._fd: int | None = None

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def write(self, data: bytes) -> None:
        """Raises OSError when the disk is full."""
        if self._fd is None and self.size + len(data) <= MEMORY_BYTES:
            self._memory += data
        else:
            if self._fd is None:
                self._move_to_disk()
            self._append(data)
        self.size += len(data)

    def _move_to_disk(self) -> None:
        directory = os.environ.get("TMPDIR") or SPOOL_DIR
        self._fd, path = tempfile.mkstemp(prefix="llmux-upload-", dir=directory)
        os.unlink(path)
        self._append(bytes(self._memory))
        self._memory = bytearray()

    def _append(self, data: bytes) -> None:
        assert self._fd is not None, "moved to disk already"
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def replace(self, start: int, end: int, data: bytes) -> None:
        """Replace a span. Call at most once, after the last ``write``."""
        self._patch = (start, end, data)
        self.size += len(data) - (end - start)

    def read(self, offset: int, count: int) -> bytes:
        start, end, data = self._patch
        if offset < start:
            return self._written(offset, min(count, start - offset))
        if offset < start + len(data):
            return data[offset - start :][:count]
        return self._written(offset - len(data) + end - start, count)

    def _written(self, offset: int, count: int) -> bytes:
        if self._fd is None:
            return bytes(self._memory[offset : offset + count])
        return os.pread(self._fd, count, offset)


def boundary_of(content_type: bytes) -> bytes:
    """The boundary in a multipart form's content-type. Raises FormError."""
    if not _MULTIPART.fullmatch(content_type.strip()):
        raise FormError("expected a body of type multipart/form-data")
    boundary = _parameters(content_type).get(b"boundary", b"")
    if not 0 < len(boundary) <= 200:
        raise FormError("the content-type names no boundary")
    return boundary


def _parameters(value: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for name, text in _PARAMETER.findall(value):
        text = text.strip()
        if text[:1] == b'"':
            text = re.sub(rb"\\(.)", rb"\1", text[1:-1])
        found.setdefault(name.lower(), text)
    return found


class ModelFinder:
    """Finds the part named "model" in a form that is fed piece by piece.

    ``stream``: whether vLLM takes the part of that name for true; the last of several counts.
    Holds at most one part's head or the model's name, never the content of a file.
    """

    def __init__(self, boundary: bytes) -> None:
        self.model: str | None = None
        self.stream = False
        self.span = (0, 0)  # the name's offsets in the form
        self._at = -2  # the offset of ``_rest`` in the form
        self._delimiter = b"\r\n--" + boundary
        self._rest = b"\r\n"  # the first delimiter may stand at the very beginning
        self._in_head = False
        self._parts = 0
        self._value: bytes | None = None  # of the part, while inside one that is read
        self._name: bytes | None = None  # of that part
        self._ended = False

    def naming(self, model: str) -> tuple[int, int, bytes]:
        """(start, end, replacement): the change of the complete form after which ``model`` is the
        one named; a part of its own at the end where none is. Raises FormError."""
        if self.model is not None:
            return *self.span, model.encode()
        if not self._ended:
            raise FormError("the form is not complete")
        head = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
        return self._at, self._at, head + model.encode() + self._delimiter

    def feed(self, data: bytes) -> None:
        """Raises FormError."""
        if self._ended:
            return
        data = self._rest + data
        at, more = 0, True
        while more and not self._ended:
            at, more = self._read_head(data, at) if self._in_head else self._read_part(data, at)
        self._rest = data[at:]
        self._at += at

    def _read_part(self, data: bytes, at: int) -> tuple[int, bool]:
        """Read up to the next delimiter. Returns (where it stopped, False: more data is needed)."""
        end = data.find(self._delimiter, at)
        if end < 0:
            end = max(at, len(data) - len(self._delimiter) + 1)
            self._take(data[at:end])
            return end, False
        self._take(data[at:end])
        after = end + len(self._delimiter)
        if len(data) < after + 2:  # "--" ends the form, CRLF begins a part
            return end, False
        self._end_value(self._at + end)
        self._ended = data.startswith(b"--", after)
        self._in_head = True
        if not self._ended:
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise FormError(f"the form has more than {MAX_PARTS} parts")
        return after, True

    def _read_head(self, data: bytes, at: int) -> tuple[int, bool]:
        end = data.find(b"\r\n\r\n", at)
        if (len(data) if end < 0 else end) - at > MAX_PART_HEAD:
            raise FormError(f"a part's head is larger than {MAX_PART_HEAD} bytes")
        if end < 0:
            return at, False
        self._in_head = False
        self._name = _part_name(data[at:end])
        if self._name == b"model" and self.model is not None:
            raise FormError('the form has more than one "model"')
        self._value = b"" if self._name in (b"model", b"stream") else None
        return end + 4, True

    def _take(self, data: bytes) -> None:
        if self._value is None:
            return
        self._value += data
        if self._name != b"model":
            self._value = self._value[:MAX_YES]
        elif len(self._value) > MAX_MODEL:
            raise FormError(f'"model" is longer than {MAX_MODEL} bytes')

    def _end_value(self, end: int) -> None:
        if self._value is None:
            return
        value, self._value = self._value, None
        if self._name != b"model":
            self.stream = is_true(value.decode("latin-1"))
            return
        self.span = (end - len(value), end)
        try:
            self.model = value.decode()
        except UnicodeDecodeError:
            raise FormError('"model" is not UTF-8') from None


def _part_name(head: bytes) -> bytes | None:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            return _parameters(value).get(b"name")
    return None
