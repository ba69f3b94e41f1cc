"""What the doctor measures only when it is asked to: seconds, and writes to the disk of images."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from time import monotonic

from llmux.config.schema import CheckpointConfig, Config
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, Needs
from llmux.drivers.doctor.room import sizes
from llmux.trusted import USE_OWN_DIRECTORY, untrusted

NAME = "images throughput"
PIECE = 4 << 20
MEASURED = 512 << 20  # more than a disk's own cache holds, and seconds on a slow one
SLOW = 300e6  # bytes per second; below it a restore takes longer than most cold starts save
SHOWN = 3


def check_throughput(host: Host, config: Config | None) -> Check:
    """Of the directory of images, past the page cache, and how long a wake reads for at least."""
    name = (config.checkpoint if config else CheckpointConfig()).images_dir
    path = host.path(name)
    if not path.is_dir():
        return Check(NAME, Level.OK, f"{name} is not there yet: nothing to measure")
    if reason := untrusted(str(path)):
        return Check(NAME, Level.WARN, reason, USE_OWN_DIRECTORY)
    if host.space(path).free < 2 * MEASURED:
        return Check(NAME, Level.WARN, f"{name}: too little space to measure it", "free some there")
    try:
        writes, reads = measure(path, MEASURED)
    except OSError as error:
        return Check(
            NAME, Level.WARN, f"{name}: {error.strerror or error}", "is the disk in order?"
        )
    seen = f"{name}: writes {writes / 1e6:.0f} MB/s, reads {reads / 1e6:.0f} MB/s"
    found = sizes(path)
    if not found:
        seen += f"; a wake from an image of 10 GiB reads for {10 * GIB / reads:.0f} s"
    for model, size in found[:SHOWN]:
        seen += f"; {model} ({size / GIB:.1f} GiB) reads for {size / reads:.1f} s"
    if reads < SLOW and Needs.of(config).criu:
        remedy = "set checkpoint.images_dir to a faster disk, or keep models in host memory"
        return Check(NAME, Level.WARN, seen, remedy)
    return Check(NAME, Level.OK, seen)


def measure(directory: Path, size: int) -> tuple[float, float]:
    """Bytes per second written and read, of a file without a name. Raises OSError."""
    fd, direct = _open(directory)
    with mmap.mmap(-1, PIECE) as piece:  # aligned to a page, as O_DIRECT wants it
        piece.write(os.urandom(PIECE))
        try:
            began = monotonic()
            for at in range(0, size, PIECE):
                os.pwrite(fd, piece, at)
            os.fsync(fd)
            written = monotonic() - began
            if not direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            began = monotonic()
            for at in range(0, size, PIECE):
                os.preadv(fd, [piece], at)
            return size / written, size / max(monotonic() - began, 1e-6)
        finally:
            os.close(fd)


def _open(directory: Path) -> tuple[int, bool]:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    with suppress(OSError):  # not on every file system
        return os.open(directory, flags | os.O_DIRECT, 0o600), True
    return os.open(directory, flags, 0o600), False
