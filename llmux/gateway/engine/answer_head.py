"""The head of an engine's response: what is passed on, and what frames the body.

The parser (httptools) has seen the same bytes, but its strictness differs between versions, and a
client frames the body by the lines passed on. So everything that two readers could frame or split
differently is refused here, as in requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from llmux.gateway.http.heads import TOKEN, BadHead

NO_BODY = frozenset({204, 304})  # these responses end with their head

# Passed on. Nothing else is: an engine must not set cookies, origins or security policies for the
# gateway's clients, and the connection's headers are ours.
PASSED_ON = frozenset(
    {
        b"allow",
        b"cache-control",
        b"content-disposition",
        b"content-encoding",
        b"content-language",
        b"content-type",
        b"date",
        b"etag",
        b"expires",
        b"last-modified",
        b"retry-after",
        b"server",
        b"vary",
        b"www-authenticate",  # of an engine with keys of its own
        b"x-accel-buffering",
    }
)
# Informational headers of the APIs that engines imitate.
PASSED_ON_PREFIXES = (b"anthropic-", b"openai-", b"x-ratelimit-")
_LENGTH = b"\r\ncontent-length: "  # as uvicorn writes it
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
MAX_LENGTH_DIGITS = 18  # what fits into 64 bits


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """``lines``: the status line and the headers for the client, without any about the length, each
    with its CRLF. ``event_stream``: one that events of ours can follow."""

    status: int
    lines: bytes
    chunked: bool
    event_stream: bool


def read_answer_head(head: bytes, status: int) -> tuple[AnswerHead, bytes]:
    """Returns (head, length line); the line has its CRLF and is b"" when absent. Raises BadHead.

    ``head`` ends with its empty line. Responses in quick succession differ only in their length,
    and once a second in their date, so the rest of the head is cached.
    """
    start = head.find(_LENGTH) + 2
    if start >= 2:
        end = head.find(b"\r\n", start) + 2
        digits = head[start + len(_LENGTH) - 2 : end - 2]
        if digits.isdigit() and len(digits) <= MAX_LENGTH_DIGITS:
            read, second = _read(head[:start] + head[end:], status)
            if second or read.chunked:
                raise BadHead("the length of the body is given more than once")
            return read, head[start:end]
    return _read(head, status)


@lru_cache(maxsize=64)
def _read(head: bytes, status: int) -> tuple[AnswerHead, bytes]:
    lines = head.split(b"\r\n")
    breaks = len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head:
        raise BadHead("a header contains a control character")
    version_1_0 = lines[0].startswith(b"HTTP/1.0 ")
    if not (version_1_0 or lines[0].startswith(b"HTTP/1.1 ")) or lines[0][9:12] != b"%d" % status:
        raise BadHead("the status line is malformed")
    passed = [b"HTTP/1.1 " + lines[0][9:]]
    length = b""
    chunked = event_stream = encoded = False
    for line in lines[1:-2]:
        at = line.find(b":")
        name = _meaning(line[: max(at, 0)])
        value = line[at + 1 :].strip(b" \t")
        if name == b"":
            continue
        if name in _FRAMING and (length or chunked):
            raise BadHead("the length of the body is given more than once")
        if name == b"content-length":
            if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
                raise BadHead("the content-length is not a number")
            length = line + b"\r\n"
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or version_1_0:
                raise BadHead("the only transfer-encoding supported is chunked")
            chunked = True
        else:
            passed.append(line)
            if name == b"content-type":
                event_stream = value.lower().startswith(b"text/event-stream")
            elif name == b"content-encoding":
                encoded = value.lower() not in (b"", b"identity")
    if chunked and status in NO_BODY:
        raise BadHead(f"a response with status {status} has no body")
    passed.append(b"")
    stream = event_stream and not encoded
    return AnswerHead(status, b"\r\n".join(passed), chunked, stream), length


@lru_cache(maxsize=256)
def _meaning(name: bytes) -> bytes:
    """Returns a header's name in lower case if it is read or passed on, else b"". Raises BadHead.
    The cache costs a third of the computation."""
    if not name or name.translate(None, TOKEN):
        raise BadHead("a header's name contains a character that is not allowed there")
    lowered = name.lower()
    if lowered in PASSED_ON or lowered in _FRAMING or lowered.startswith(PASSED_ON_PREFIXES):
        return lowered
    return b""
