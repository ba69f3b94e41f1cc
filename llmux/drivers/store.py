"""The state file: one small JSON document, replaced as a whole.

A hint for reconcile, so it is not fsynced: after a power failure there are no engines to recognise,
and an fsync can hold the event loop for longer than everything else together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from llmux import typed_json
from llmux.errors import StateFileError
from llmux.small_files import read_small, replace_small
from llmux.typed_json import BadJson

VERSION: Final = 1
MAX_BYTES: Final = 16 * 1024 * 1024  # a thousand models take 1 MiB


class FileStateStore:
    """StateStore at ``path``; its directory must exist. 0600, as it names users' models."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> Mapping[str, Any]:
        """The document last saved, {} when there is none. Raises StateFileError; what is there is
        then put aside."""
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self.put_aside(str(error)) from error

    def _read(self) -> Mapping[str, Any]:
        envelope = typed_json.parse(read_small(self._path, MAX_BYTES))
        if not isinstance(envelope, dict) or not typed_json.fits(int, envelope.get("version")):
            raise BadJson("it is not a state file of llmux")
        if envelope["version"] > VERSION:
            raise BadJson(
                f"it was written by a newer llmux (format {envelope['version']}, this one knows"
                f" {VERSION})"
            )
        document = envelope.get("state")
        if not isinstance(document, dict):
            raise BadJson("it holds no state")
        return document

    def put_aside(self, why: str) -> StateFileError:
        """One is kept, the latest."""
        kept = f"{self._path}.damaged"
        try:
            os.rename(self._path, kept)
        except OSError as error:
            return self._error(f"{why}; it cannot be put aside as {kept}: {error.strerror}")
        return self._error(f"{why}; it is kept as {kept}")

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
