"""The head of an engine's answer, line by line: what the client gets of it, and what it says.

The parser (httptools) has seen the same bytes and judges length and framing. Lines are passed on as
they came, so what two readers could split differently is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from llmux.gateway.heads import TOKEN, BadHead

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
_LENGTH = b"\r\ncontent-length: "  # as uvicorn writes it
_READ = frozenset({b"content-length", b"content-type", b"transfer-encoding"})


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """``lines``: the status line and the headers for the client, without any about the length, each
    with its CRLF."""

    status: int
    lines: bytes
    chunked: bool
    event_stream: bool


def read_answer_head(head: bytes, status: int) -> tuple[AnswerHead, bytes]:
    """And the line that says the length, with its CRLF, or b"". ``head`` ends with its empty line;
    the parser has seen that there are not two lengths. Raises BadHead.

    Answers that come fast differ in their length and for a second in nothing else, so that the rest
    of the head is read once for all of them.
    """
    start = head.find(_LENGTH) + 2
    if start >= 2:
        end = head.find(b"\r\n", start) + 2
        if head[start + len(_LENGTH) - 2 : end - 2].isdigit():
            return _read(head[:start] + head[end:], status)[0], head[start:end]
    return _read(head, status)


@lru_cache(maxsize=64)
def _read(head: bytes, status: int) -> tuple[AnswerHead, bytes]:
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks:
        raise BadHead("a line of the head is broken otherwise than by CRLF")
    passed = [b"HTTP/1.1 " + lines[0][9:]]
    length = b""
    chunked = event_stream = False
    for line in lines[1:-2]:
        name = _meaning(line[: line.find(b":")])
        if name is None:
            passed.append(line)
        elif name == b"content-type":
            passed.append(line)
            event_stream = line[13:].lstrip().startswith(b"text/event-stream")
        elif name == b"content-length":
            length = line + b"\r\n"
        elif name == b"transfer-encoding":
            chunked = b"chunked" in line.lower()
    passed.append(b"")
    return AnswerHead(status, b"\r\n".join(passed), chunked, event_stream), length


@lru_cache(maxsize=256)
def _meaning(name: bytes) -> bytes | None:
    """A header's name in lower case where it means something here; None: it is passed on. Raises
    BadHead. Engines use few names: looking one up costs a third of telling it anew."""
    if not name or name.translate(None, TOKEN):
        raise BadHead("a line of the head is no header")
    lowered = name.lower()
    return lowered if lowered in _READ or lowered in NOT_PASSED_ON else None
