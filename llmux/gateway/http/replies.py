"""Complete responses that the gateway writes itself: early refusals, and OPTIONS."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmux.errors import Refused
from llmux.gateway.http.cors import Cors
from llmux.gateway.http.problems import error_response
from llmux.gateway.http.request import Incoming

MAX_AGE_SECS = 7200  # the longest that a browser caches a preflight (Chromium)
_NAMES = re.compile(rb"[A-Za-z0-9_-]+(?:\s*,\s*[A-Za-z0-9_-]+)*")


def refusal(incoming: Incoming, problem: Refused, cors: Cors | None, *, close: bool) -> bytes:
    """The error response; for HEAD only its head."""
    extra = b"x-request-id: %b\r\n" % incoming.request_id
    if incoming.head.origin and cors is not None:
        extra += cors.headers(incoming.head.origin)
    whole = error_response(problem, extra=extra, close=close, anthropic=incoming.anthropic)
    return whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if incoming.method == b"HEAD" else whole


def options_response(
    incoming: Incoming, methods: Iterable[str], cors: Cors | None, *, close: bool
) -> bytes:
    """The response to OPTIONS, with the preflight headers when the origin is allowed."""
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
