"""The manifest of an image: what is in it, what it was made for, how its engine is woken.

Written last, so a directory that has a readable one is complete. JSON with a version; a manifest
of another version is no manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from llmux.drivers.criu_shm import ShmGroup
from llmux.drivers.criu_tree import TreeProcess
from llmux.drivers.images_files import FileSums

VERSION: Final = 1
NAME: Final = "manifest.json"
MAX_BYTES: Final = 16 * 1024 * 1024  # 100 GB of pages make 80 KB of checksums; more is no manifest


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
    files: tuple[FileSums, ...]
    apparent_bytes: int
    disk_bytes: int

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            body = json.loads(text)
            if not isinstance(body, dict):
                raise ManifestError("it is not a JSON object")
            if (version := body.pop("version", None)) != VERSION:
                raise ManifestError(f"its version is {version!r}, this llmux writes {VERSION}")
            return cls(
                **{
                    **body,
                    "processes": tuple(
                        TreeProcess(item["pid"], item["comm"], tuple(item["tids"]))
                        for item in body["processes"]
                    ),
                    "runtime_dir": KeptPath(**body["runtime_dir"]) if body["runtime_dir"] else None,
                    "append_files": tuple(KeptPath(**item) for item in body["append_files"]),
                    "unix_paths": tuple(body["unix_paths"]),
                    "tcp_ports": tuple(body["tcp_ports"]),
                    "shm": tuple(ShmGroup.from_json(item) for item in body["shm"]),
                    "files": tuple(
                        FileSums(item["name"], item["size"], tuple(item["sums"]))
                        for item in body["files"]
                    ),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(f"it cannot be read: {error!r}") from error


def load_manifest(directory: str) -> Manifest:
    """Raises ManifestError."""
    path = os.path.join(directory, NAME)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, encoding="utf-8") as file:
            if os.fstat(fd).st_size > MAX_BYTES:
                raise ManifestError(f"{path} is too large to be one")
            return Manifest.from_json(file.read())
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
