"""Notes about a dump or restore under way, for the next supervisor if this one dies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

DUMPING: Final = "dumping.json"  # in the directory of a dump
RESTORING: Final = "restoring.json"  # in the directory of a model


def write_note(path: str, body: Mapping[str, Any]) -> None:
    """Write the note atomically."""
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(body, file)
    os.rename(f"{path}.new", path)


def read_note(path: str) -> dict[str, Any]:
    """Empty when there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            body = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
