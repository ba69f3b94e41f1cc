"""Notes about a dump or restore under way, for the next supervisor if this one dies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llmux import typed_json
from llmux.small_files import read_small, replace_small

DUMPING: Final = "dumping.json"  # in the directory of a dump
MAX_BYTES: Final = 1024 * 1024
RESTORING: Final = "restoring.json"  # in the directory of a model


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
