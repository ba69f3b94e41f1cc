"""Find the id of a response that the engine stores, in the response's own bytes."""

from __future__ import annotations

import re
from typing import Final

# The response's id is the first one in it; vLLM writes it at the very beginning.
SEARCHED_BYTES: Final = 4096
_RESPONSE_ID: Final = re.compile(rb'"id":\s*"([A-Za-z0-9_-]{1,200})"')


class ResponseIdFinder:
    """``done``: the id was found, or was not in the first bytes."""

    __slots__ = ("_seen", "done")

    def __init__(self) -> None:
        self._seen = b""
        self.done = False

    def feed(self, data: bytes) -> str | None:
        """Returns the id once, when it is complete."""
        self._seen += data[:SEARCHED_BYTES]
        found = _RESPONSE_ID.search(self._seen)
        self.done = found is not None or len(self._seen) >= SEARCHED_BYTES
        return None if found is None else found[1].decode()
