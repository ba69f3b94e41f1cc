"""One request as it came from a client, and the heads made of it for engines and for Sanic.

Heads are written anew from the parsed header list, never copied: an engine gets exactly one length,
measured by us, and none of the headers that are about the client's connection.
"""

from __future__ import annotations

import itertools
import os

from llmux.errors import Refused

# About the connection, not the message (RFC 9110 7.6.1), or written anew.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)
MAX_REQUEST_ID = 128

_prefix = os.urandom(6).hex()
_count = itertools.count(1)


def new_request_id() -> str:
    """Unique without a system call per request: a random prefix per process and a counter."""
    return f"req-{_prefix}-{next(_count):x}"


class Incoming:
    """Filled by the client's parser; complete when ``body`` is whole or ``problem`` is set."""

    __slots__ = (
        "body", "expects_continue", "headers", "keep_alive", "method", "problem", "request_id",
        "target", "version_1_0",
    )  # fmt: skip

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.expects_continue = False
        self.keep_alive = True
        self.version_1_0 = False
        self.request_id = ""
        self.problem: Refused | None = None

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header given in lower case."""
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return None

    def framing(self) -> int | str:
        """The announced length of the body (0 = none or chunked), or what is wrong with the head.

        The parser refuses these as well, but its strictness differs between versions (http-parser
        in Debian 12's httptools, llhttp later), and a length that two readers read differently is
        how requests are smuggled.
        """
        length = 0
        seen = 0
        for name, value in self.headers:
            if b"\n" in value or b"\r" in value or b"\0" in value:
                return "a header value contains a control character"
            size = len(name)
            if size == 14 and name.lower() == b"content-length":
                if not value.isdigit():
                    return "the content-length is not a number"
                length = int(value)
                seen += 1
            elif size == 17 and name.lower() == b"transfer-encoding":
                if value.lower() != b"chunked" or self.version_1_0:
                    return "the only transfer-encoding understood is chunked"
                seen += 1
            elif size == 6 and name.lower() == b"expect":
                self.expects_continue = not self.version_1_0
        return length if seen < 2 else "the length of the body is given more than once"

    def take_request_id(self) -> None:
        """The client's X-Request-Id when it is short and printable, else a new one."""
        given = self.header(b"x-request-id")
        if given and len(given) <= MAX_REQUEST_ID and given.isascii():
            text = given.decode("ascii")
            if text.isprintable():
                self.request_id = text
                return
        self.request_id = new_request_id()

    def _forwarded(self) -> list[bytes]:
        dropped = HOP_BY_HOP
        connection = self.header(b"connection")
        if connection is not None and connection.lower() not in (b"keep-alive", b"close"):
            named = {token.strip().lower() for token in connection.split(b",")}
            dropped = HOP_BY_HOP | named
        return [name + b": " + value for name, value in self.headers if name.lower() not in dropped]

    def _head(self, version: bytes, extra: bytes) -> bytes:
        lines = self._forwarded()
        lines.append(b"x-request-id: " + self.request_id.encode("ascii"))
        return b"%b %b %b\r\n%b\r\ncontent-length: %d\r\n%b\r\n" % (
            self.method, self.target, version, b"\r\n".join(lines), len(self.body), extra,
        )  # fmt: skip

    def engine_head(self) -> bytes:
        return self._head(b"HTTP/1.1", b"")

    def sanic_request(self, *, close: bool) -> bytes:
        """The whole request in the one plain form that Sanic gets to see."""
        version = b"HTTP/1.0" if self.version_1_0 else b"HTTP/1.1"
        kind = b"close" if close or not self.keep_alive else b"keep-alive"
        return self._head(version, b"connection: %b\r\n" % kind) + self.body
