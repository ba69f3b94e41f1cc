"""The head of an engine's answer, line by line: what the client gets of it, and what it says.

The parser (httptools) has seen the same bytes and judges length and framing. Lines are passed on as
they came, so what two readers could split differently is refused here.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import lru_cache

NO_BODY = frozenset({204, 304})  # these answers end with their head

# About the engine's connection to us, or written by ourselves.
NOT_PASSED_ON = frozenset(
    {
        b"access-control-allow-credentials",  # which pages may read it is said by us or not at all
        b"access-control-allow-origin",
        b"access-control-expose-headers",
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"trailer",
        b"upgrade",
        b"x-llmux-switch",
        b"x-llmux-wait-ms",
        b"x-request-id",
    }
)
_READ = frozenset({b"content-length", b"content-type", b"transfer-encoding"})
_TOKEN = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()


class BadHead(Exception):
    """What is wrong with a head."""


@dataclass(slots=True)
class AnswerHead:
    """``lines``: the status line and the headers for the client, without any about the length.

    ``until_close``: neither a length nor chunks: the end of the connection ends the body.
    """

    status: int
    lines: list[bytes]
    length_line: bytes = b""
    chunked: bool = False
    event_stream: bool = False
    until_close: bool = False


def read_answer_head(head: bytes, status: int) -> AnswerHead:
    """``head`` ends with its empty line. Raises BadHead."""
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks:
        raise BadHead("a line of the head is broken otherwise than by CRLF")
    read = AnswerHead(status, [b"HTTP/1.1 " + lines[0][9:]])
    for line in lines[1:-2]:
        name = _meaning(line[: line.find(b":")])
        if name is None:
            read.lines.append(line)
        elif name == b"content-type":
            read.lines.append(line)
            read.event_stream = line[13:].lstrip().startswith(b"text/event-stream")
        elif name == b"content-length":
            read.length_line = line
        elif name == b"transfer-encoding":
            read.chunked = b"chunked" in line.lower()
    return read


@lru_cache(maxsize=256)
def _meaning(name: bytes) -> bytes | None:
    """A header's name in lower case where it means something here; None: it is passed on. Raises
    BadHead. Engines use few names: looking one up costs a third of telling it anew."""
    if not name or name.translate(None, _TOKEN):
        raise BadHead("a line of the head is no header")
    lowered = name.lower()
    return lowered if lowered in _READ or lowered in NOT_PASSED_ON else None
