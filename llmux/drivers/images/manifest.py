"""The manifest of an image: what is in it, what it was made for, how its engine is woken.

Written last, so a directory that has a readable one is complete. JSON with a version; a manifest
of another version is no manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from llmux import typed_json
from llmux.drivers.images.files import SEGMENT, FileSums
from llmux.small_files import read_small
from llmux.typed_json import LARGEST_INT, BadJson

VERSION: Final = 2
NAME: Final = "manifest.json"
MAX_BYTES: Final = 16 * 1024 * 1024  # 100 GB of pages make 80 KB of checksums; more is no manifest
LARGEST_ID: Final = 2**32 - 2  # the last one means "no change" to chown(2)
LARGEST_PID: Final = 2**22


class ManifestError(Exception):
    """There is no manifest that can be used; the text says why."""


@dataclass(frozen=True, slots=True)
class KeptPath:
    """A file or directory outside the image that a restored engine expects, with its owner."""

    path: str
    uid: int
    gid: int
    mode: int

    @classmethod
    def look(cls, path: str) -> Self | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        return cls(path, status.st_uid, status.st_gid, status.st_mode & 0o7777)


@dataclass(frozen=True, slots=True)
class KnownFile:
    """What a path led to when the engine was dumped; ``mode`` includes the type."""

    path: str
    device: int
    inode: int
    uid: int
    mode: int


@dataclass(frozen=True, slots=True)
class TreeProcess:
    """A process of the image and its thread ids."""

    pid: int
    comm: str
    tids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShmGroup:
    """One kept file: its names in /dev/shm and where in the image its content is."""

    names: tuple[str, ...]
    file: str
    size: int
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A kept file of the engine's home: its path, and where in the image its content is."""

    path: str
    file: str
    size: int
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Manifest:
    model: str
    created: float
    dump_seconds: float
    cold_seconds: float
    criu: str
    identity: Mapping[str, str]
    recipe: Mapping[str, Any]
    root_pid: int
    processes: tuple[TreeProcess, ...]
    runtime_dir: KeptPath | None
    append_files: tuple[KeptPath, ...]
    unix_paths: tuple[str, ...]
    tcp_ports: tuple[int, ...]
    shm: tuple[ShmGroup, ...]
    known: tuple[KnownFile, ...]
    files: tuple[FileSums, ...]
    apparent_bytes: int
    disk_bytes: int
    small: tuple[SmallFile, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ManifestError: every field has its type and a value that can be."""
        try:
            body = typed_json.parse(text)
            if not isinstance(body, dict):
                raise ManifestError("it is not a JSON object")
            if (version := body.get("version")) != VERSION:
                raise ManifestError(f"its version is {version!r}, this llmux writes {VERSION}")
            manifest = typed_json.read(cls, body)
        except BadJson as error:
            raise ManifestError(f"it cannot be read: {error}") from error
        if (wrong := next(out_of_range(manifest), None)) is not None:
            raise ManifestError(f"it cannot be read: {wrong}")
        return manifest


def out_of_range(manifest: Manifest) -> Iterator[str]:
    """The first of these would otherwise be found where root acts on it."""
    inside: list[ShmGroup | SmallFile] = [*manifest.shm, *manifest.small]
    owned: list[KeptPath | ShmGroup | SmallFile] = [*manifest.append_files, *inside]
    if manifest.runtime_dir is not None:
        owned.append(manifest.runtime_dir)
    paths: list[KeptPath | ShmGroup | SmallFile | KnownFile] = [*owned, *manifest.known]
    sized: list[FileSums | ShmGroup | SmallFile] = [*manifest.files, *inside]
    ids = [("uid", one.uid) for one in paths] + [("gid", one.gid) for one in owned]
    modes = [("mode", one.mode) for one in paths]
    pids = [("pid", pid) for process in manifest.processes for pid in (process.pid, *process.tids)]
    sizes = [("size", one.size) for one in sized]
    sizes += [("bytes", manifest.apparent_bytes), ("bytes", manifest.disk_bytes)]
    for values, least, most in (
        (ids, 0, LARGEST_ID),
        (modes, 0, 0o177777),
        ([("root_pid", manifest.root_pid), *pids], 1, LARGEST_PID),
        ([("tcp_ports", port) for port in manifest.tcp_ports], 1, 65535),
        (sizes, 0, LARGEST_INT),
    ):
        for name, value in values:
            if not least <= value <= most:
                yield f"{name}: {value} is out of range"
    for file in manifest.files:
        if len(file.sums) != -(-file.size // SEGMENT):
            yield f"{file.name}: {len(file.sums)} checksums for {file.size} bytes"
    for name in (*(file.name for file in manifest.files), *(kept.file for kept in inside)):
        if os.path.isabs(name) or ".." in name.split("/"):
            yield f"the file {name!r} is outside of the image"


def load_manifest(directory: str) -> Manifest:
    """Raises ManifestError."""
    path = os.path.join(directory, NAME)
    try:
        return Manifest.from_json(read_small(path, MAX_BYTES, links=False).decode())
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist: the image was never completed") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from error


def first_mismatch(
    old: Mapping[str, str], new: Mapping[str, str], ignore: frozenset[str]
) -> str | None:
    """The first named field that differs, with both values; None when the image still fits."""
    for key in sorted({*old, *new} - ignore):
        before, now = old.get(key), new.get(key)
        if before != now:
            return f"{key} was {_shown(before)} when the image was made and is {_shown(now)} now"
    return None


def _shown(value: str | None, limit: int = 200) -> str:
    if value is None:
        return "not known"
    return f'"{value if len(value) <= limit else value[:limit] + "…"}"'
