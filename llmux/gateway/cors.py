"""Web pages of other origins: nobody is let in unless the configuration names them.

Engines are never told a request's origin, and what they say of it is dropped: this is decided here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmux.gateway.incoming import Incoming

EXPOSED = b"retry-after, x-request-id, x-llmux-wait-ms, x-llmux-switch"
MAX_AGE_SECS = 7200  # the longest that a browser remembers it (Chromium)
_NAMES = re.compile(rb"[A-Za-z0-9_-]+(?:\s*,\s*[A-Za-z0-9_-]+)*")


class Cors:
    """``origins``: those that may; ``*`` among them: all, though without cookies."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._any = b"*" in self._origins

    def headers(self, origin: bytes) -> bytes:
        """Header lines for an answer; b"" when this origin may not read it."""
        if not self._any and origin not in self._origins:
            return b""
        allowed = b"*" if self._any else origin
        return (
            b"access-control-allow-origin: " + allowed + b"\r\n"
            b"access-control-expose-headers: " + EXPOSED + b"\r\n"
            b"vary: origin\r\n"
        )


def options_response(
    incoming: Incoming, methods: Iterable[str], cors: Cors | None, *, close: bool
) -> bytes:
    """The answer to OPTIONS; to a browser's preflight when the origin may."""
    allow = ", ".join([*methods, "OPTIONS"]).encode()
    lines = [b"HTTP/1.1 204 No Content", b"allow: " + allow]
    own = cors.headers(incoming.head.origin) if cors is not None and incoming.head.origin else b""
    if own and incoming.header(b"access-control-request-method"):
        asked = incoming.header(b"access-control-request-headers")
        lines.append(b"access-control-allow-methods: " + allow)
        lines.append(b"access-control-max-age: %d" % MAX_AGE_SECS)
        if _NAMES.fullmatch(asked):
            lines.append(b"access-control-allow-headers: " + asked)
    lines.append(own + b"x-request-id: " + incoming.request_id)
    if close:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"
