"""Cross-origin access: refused unless the configuration lists the page's origin.

Engines never see a request's origin, and their own CORS headers are dropped: this module decides.
"""

from __future__ import annotations

from collections.abc import Iterable

EXPOSED = b"retry-after, x-request-id, x-llmux-wait-ms, x-llmux-switch"


class Cors:
    """``origins``: the allowed ones; ``*`` among them allows all, without cookies."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._any = b"*" in self._origins

    def allows(self, origin: bytes) -> bool:
        return self._any or origin in self._origins

    def headers(self, origin: bytes) -> bytes:
        """Header lines for a response; b"" when this origin may not read it."""
        if not self.allows(origin):
            return b""
        allowed = b"*" if self._any else origin
        return (
            b"access-control-allow-origin: " + allowed + b"\r\n"
            b"access-control-expose-headers: " + EXPOSED + b"\r\n"
            b"vary: origin\r\n"
        )
