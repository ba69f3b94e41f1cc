"""The state file: one small JSON document, replaced as a whole.

A hint for reconcile, so it is not fsynced: after a power failure there are no engines to recognise,
and an fsync can hold the event loop for longer than everything else together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llmux import typed_json
from llmux.errors import StateFileError
from llmux.small_files import read_small, replace_small

VERSION: Final = 1
MAX_BYTES: Final = 16 * 1024 * 1024  # a thousand models take 1 MiB


class FileStateStore:
    """StateStore at ``path``; its directory must exist. 0600, as it names users' models."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> Mapping[str, Any]:
        """The document last saved, {} when there is none. Raises StateFileError."""
        try:
            envelope = typed_json.parse(read_small(self._path, MAX_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self._error(str(error)) from error
        if not isinstance(envelope, dict) or not isinstance(envelope.get("version"), int):
            raise self._error("it is not a state file of llmux")
        if envelope["version"] > VERSION:
            raise self._error(
                f"it was written by a newer llmux (format {envelope['version']}, this one knows"
                f" {VERSION})"
            )
        document = envelope.get("state")
        if not isinstance(document, dict):
            raise self._error("it holds no state")
        return document

    def save(self, document: Mapping[str, Any]) -> None:
        """Raises StateFileError; the old document is whole in any case."""
        try:
            # Not json.dump(): it never uses the encoder in C, and this runs four times a switch.
            text = json.dumps({"version": VERSION, "state": dict(document)})
            replace_small(self._path, text.encode())
        except (OSError, TypeError, ValueError) as error:
            raise self._error(str(error), verb="write") from error

    def _error(self, cause: str, verb: str = "read") -> StateFileError:
        return StateFileError(
            f"cannot {verb} the state file {self._path}: {cause}",
            hint="it is only a hint; llmux goes on without it and writes a new one",
        )
