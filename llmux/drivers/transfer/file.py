"""An image's stream as a file: ``MODEL.tar`` in a directory, ``.part`` until it is complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from llmux.drivers.images.files import sync_directory
from llmux.drivers.transfer.header import BadStream, Header
from llmux.drivers.transfer.stream import receive_header, segments, skip_entries
from llmux.errors import LlmuxError
from llmux.names import escape
from llmux.trusted import unsafe_file, untrusted


def write_file(
    directory: str, header: Header, write: Callable[[IO[bytes], int, bool], None]
) -> str:
    """Write the stream, or the rest of one that broke off; ``write`` gets the first segment that is
    missing, and whether the header is as well. Returns the path."""
    path = os.path.join(directory, escape(header.manifest.model) + ".tar")
    part = f"{path}.part"
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "r+b") as file:
            first = _complete_until(file, header)
            file.truncate()
            write(file, first, file.tell() == 0)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
        sync_directory(directory)
    except OSError as error:
        raise LlmuxError(f"cannot write {part}: {error.strerror}") from error
    return path


def _complete_until(file: IO[bytes], header: Header) -> int:
    """The first segment that is missing; the file stands where it goes, or at its start."""
    numbers = {segment.name: segment.number for segment in segments(header.manifest)}
    first, end = 0, 0
    with suppress(BadStream):
        if receive_header(file).id != header.id:
            file.seek(0)
            return 0
        end = file.tell()
        for entry in skip_entries(file):
            if entry.name not in numbers:
                break
            first, end = numbers[entry.name] + 1, file.tell()
    file.seek(end)
    return first


def open_file(path: str) -> IO[bytes]:
    """A stream to be imported. Raises LlmuxError when another user could have changed it."""
    try:
        if reason := untrusted(os.path.dirname(os.path.abspath(path))) or unsafe_file(path):
            raise LlmuxError(
                f"cannot import {path}: {reason}",
                hint="an image becomes processes with any user's rights: keep it in a directory"
                " of root's",
            )
        return open(path, "rb")
    except OSError as error:
        raise LlmuxError(f"cannot import {path}: {error.strerror}") from error
