"""Notes about a dump or restore under way, for the next supervisor if this one dies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Self

from llmux import typed_json
from llmux.drivers.images.manifest import LARGEST_ID
from llmux.small_files import read_small, replace_small
from llmux.typed_json import LARGEST_INT, BadJson, Within

DUMPING: Final = "dumping.json"  # in the directory of a dump
MAX_BYTES: Final = 1024 * 1024
RESTORING: Final = "restoring.json"  # in the directory of a model
MAX_TEXT: Final = 4096  # the kernel's PATH_MAX

Number = Annotated[int, Within(0, LARGEST_INT)]


@dataclass(frozen=True, slots=True)
class Begun:
    """What a note says. ``shm``: (device, inode) of files; ``names`` are of /dev/shm; ``leftovers``
    are paths that a restore of user ``uid`` may have left."""

    unit: str
    operation: str
    shm: tuple[tuple[Number, Number], ...] = ()
    names: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    uid: Annotated[int, Within(0, LARGEST_ID)] = 0

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> Self:
        """Raises BadJson."""
        begun = typed_json.read(cls, note)
        for text in (begun.unit, *begun.names, *begun.leftovers):
            if "\0" in text or len(text) > MAX_TEXT:
                raise BadJson(f"{text[:80]!r} is no name")
        if any(os.path.basename(name) != name or not name for name in begun.names):
            raise BadJson("names: a path")
        return begun


def write_note(path: str, body: Mapping[str, Any]) -> None:
    """Write the note atomically."""
    replace_small(path, json.dumps(body).encode())


def read_note(path: str) -> dict[str, Any]:
    """Empty when there is none."""
    try:
        body = typed_json.parse(read_small(path, MAX_BYTES))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
