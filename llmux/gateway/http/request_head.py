"""The head of a client's request, header by header: read by the gateway, passed on, or refused.

The parsers refuse most malformed heads as well, but their strictness differs (http-parser in Debian
12's httptools, llhttp later), and request smuggling works through a length that two readers read
differently.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from llmux.gateway.http.heads import TOKEN, BadHead

Headers = list[tuple[bytes, bytes]]

# Not passed on: about the connection, not the message (RFC 9110 7.6.1), or written by us.
NOT_FORWARDED = frozenset(
    {
        b"accept-encoding",  # a compressed answer can follow no comment, nor be renamed
        b"authorization",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"expect",
        b"host",  # counted, and then passed on
        b"keep-alive",
        b"origin",  # else the engine decides itself which pages may read its response
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-llmux-keep-alive",
        b"x-api-key",
        b"x-request-id",
        b"x-request-timeout",
        b"x-stainless-timeout",
    }
)
MAX_REQUEST_ID = 128
MAX_KEPT = 2048  # bytes of the largest head that is cached for a connection's lifetime
TIMEOUTS = frozenset({b"x-request-timeout", b"x-stainless-timeout"})
_DURATION = re.compile(rb"([0-9]{1,7}(?:\.[0-9]{1,9})?)([smhd]?)")
_UNIT_SECS = {b"": 1.0, b"s": 1.0, b"m": 60.0, b"h": 3600.0, b"d": 86400.0}
_SECONDS = re.compile(rb"[0-9]{1,7}(?:\.[0-9]{1,9})?")


@dataclass(slots=True)
class RequestHead:
    """A head without its length. Requests share it, so it must not be changed.

    ``forwarded``: header lines for the engine, each with its CRLF. ``credentials``: lines passed on
    only when llmux itself has no keys. ``request_id``: b"" when absent or unusable.
    ``timeout_secs``: the client's own timeout.
    """

    version_1_0: bool = False
    forwarded: bytes = b""
    credentials: bytes = b""
    authorization: bytes = b""
    x_api_key: bytes = b""
    origin: bytes = b""
    host: bytes | None = None  # None: HTTP/1.0 without one, which no browser sends
    request_id: bytes = b""
    timeout_secs: float | None = None
    encoding: bytes = b""  # of the body; b"": as it is
    keep_alive_secs: float | None = None  # how long the model may stay without use
    expects_continue: bool = False


NO_HEAD = RequestHead()  # for a request whose head was not received


class HeadReader:
    """Reads the heads of one connection.

    A client's next request mostly repeats the previous head except for the length: comparing costs
    a tenth of parsing.
    """

    __slots__ = ("_at", "_headers", "_read", "_version")

    def __init__(self) -> None:
        self._read: RequestHead | None = None  # the previous head, parsed …
        self._headers: Headers = []  # … and as received
        self._version = ""
        self._at = 0  # index of its content-length

    def read(self, headers: Headers, version: str) -> tuple[RequestHead, int]:
        """As ``read_head``."""
        before = self._headers
        if self._read is not None and len(headers) == len(before) and version == self._version:
            at = self._at
            name, value = given = headers[at]
            headers[at] = before[at]
            same = headers == before
            headers[at] = given
            if same and name == before[at][0] and value.isdigit():
                return self._read, int(value)
        self._read = None
        read, length = read_head(headers, version)
        if sum(map(len, chain.from_iterable(headers))) <= MAX_KEPT:
            for at, (name, _) in enumerate(headers):
                if name.lower() == b"content-length":
                    self._read, self._headers, self._version, self._at = read, headers, version, at
                    break
        return read, length


def read_head(headers: Headers, version: str) -> tuple[RequestHead, int]:
    """Returns (head, content length); the length is 0 when absent or chunked. Raises BadHead."""
    if version != "1.1" and version != "1.0":  # the parsers take 0.9 and 2.0 as well
        raise BadHead("only HTTP/1.0 and HTTP/1.1 are supported")
    read = RequestHead(version == "1.0")
    length = lengths = hosts = 0
    lines: list[bytes] = []
    named: list[bytes] = []
    credentials: list[bytes] = []
    for name, value in headers:
        meaning = _meaning(name)
        if meaning is None:
            lines.append(name + b": " + value)
        elif meaning == b"host":
            lines.append(name + b": " + value)
            read.host = value
            hosts += 1
        elif meaning == b"content-length":
            if not value.isdigit():
                raise BadHead("the content-length is not a number")
            length = int(value)
            lengths += 1
        elif meaning == b"transfer-encoding":
            if value.lower() != b"chunked" or read.version_1_0:
                raise BadHead("the only transfer-encoding supported is chunked")
            lengths += 1
        elif meaning == b"connection":
            named += value.lower().split(b",")
        elif meaning == b"authorization" or meaning == b"x-api-key":
            if read.authorization if meaning == b"authorization" else read.x_api_key:
                raise BadHead(f"{meaning.decode()} is given more than once")
            credentials.append(name + b": " + value)
            _take(read, meaning, value)
        elif not meaning:
            raise BadHead("a header's name contains a character that is not allowed there")
        else:
            _take(read, meaning, value)
    if lengths > 1:
        raise BadHead("the length of the body is given more than once")
    if hosts != 1 and (hosts or not read.version_1_0):  # RFC 9112 3.2
        raise BadHead("the host is missing or given more than once")
    if named:
        dropped = {token.strip() for token in named} - {b"close", b"keep-alive"}
        lines = [line for line in lines if line.partition(b":")[0].lower() not in dropped]
    read.forwarded = b"\r\n".join([*lines, b""])
    if credentials:
        read.credentials = b"\r\n".join([*credentials, b""])
    written = read.forwarded + read.credentials
    breaks = len(lines) + len(credentials)
    if written.count(b"\n") != breaks or written.count(b"\r") != breaks or b"\0" in written:
        raise BadHead("a header contains a control character")
    return read, length


@lru_cache(maxsize=512)
def _meaning(name: bytes) -> bytes | None:
    """Returns a header's name in lower case if the gateway reads or drops it; None if it is passed
    on; b"" if it is invalid. The cache costs a third of the computation."""
    if not name or name.translate(None, TOKEN):
        return b""
    lowered = name.lower()
    return lowered if lowered in NOT_FORWARDED else None


def _keep_alive_secs(value: bytes) -> float:
    if value == b"-1":
        return math.inf
    found = _DURATION.fullmatch(value)
    if found is None:
        raise BadHead("X-Llmux-Keep-Alive must be a duration such as 10m, 0, or -1 for ever")
    return float(found[1]) * _UNIT_SECS[found[2]]


def _take(read: RequestHead, meaning: bytes, value: bytes) -> None:
    """Store a header that only the gateway reads."""
    if meaning == b"authorization":
        read.authorization = value
    elif meaning == b"x-api-key":
        read.x_api_key = value
    elif meaning == b"origin":
        read.origin = value
    elif meaning == b"content-encoding":
        if value.strip().lower() not in (b"", b"identity"):
            read.encoding = value
    elif meaning == b"expect":
        read.expects_continue = value.lower() == b"100-continue" and not read.version_1_0
    elif meaning == b"x-request-id":
        if len(value) <= MAX_REQUEST_ID and value.isascii() and value.decode().isprintable():
            read.request_id = value
    elif meaning == b"x-llmux-keep-alive":
        read.keep_alive_secs = _keep_alive_secs(value)
    elif meaning in TIMEOUTS and _SECONDS.fullmatch(value):
        # Seconds, as OpenAI's and Anthropic's clients send them; the shorter of two counts.
        seconds = float(value)
        if read.timeout_secs is None or seconds < read.timeout_secs:
            read.timeout_secs = seconds
