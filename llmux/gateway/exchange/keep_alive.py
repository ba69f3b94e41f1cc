"""Keep-alive comments (pings on Anthropic's routes) until the first byte of an event stream, or for
chat a text about what it waits for.

Sent while a request waits for its model and while its engine has not answered yet. The first one
commits the status 200; a later failure is reported as an error event in the stream.
"""

from __future__ import annotations

import json

from llmux.errors import Reason, Refused
from llmux.gateway.admission.queue import Ticket
from llmux.gateway.exchange.loading_text import LOOK_SECS, ChatText

MAX_ERROR = 64 * 1024  # bytes of an engine's error response that are passed on in an event

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nx-accel-buffering: no\r\ntransfer-encoding: chunked\r\n"
)
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class KeepAlive:
    """``started``: the head was sent before the engine answered. ``pause``: seconds until there may
    be something to send. ``error``: collects an engine's response that cannot follow that head;
    None: none does; ``in_chunks``: as it comes. ``frames``: the engine's stream has no chunks, and
    gets them here."""

    __slots__ = ("_comment", "_text", "error", "frames", "in_chunks", "pause", "started")

    def __init__(
        self, model: str, interval: float, *, anthropic: bool, text: ChatText | None = None
    ) -> None:
        self._comment = PING if anthropic else f": waiting for {model}\n\n".encode()
        self._text = text
        self.pause = interval if text is None else LOOK_SECS
        self.started = self.frames = self.in_chunks = False
        self.error: bytearray | None = None

    def chunk(self, ticket: Ticket, now: float) -> bytes:
        """What is due; empty when that is nothing."""
        event = self._comment if self._text is None else self._text.event(ticket, now)
        return framed(event)

    def collects(self, *, in_chunks: bool) -> None:
        self.error, self.in_chunks = bytearray(), in_chunks

    def collect(self, data: bytes) -> None:
        assert self.error is not None, "collecting was begun"
        if len(self.error) <= MAX_ERROR:
            self.error += data

    def problem(self) -> Refused:
        """The collected error response as a refusal."""
        body = bytes(self.error or b"")
        return Refused(Reason.BAD_REQUEST, _message(unframed(body) if self.in_chunks else body))


def framed(data: bytes) -> bytes:
    """As a chunk; nothing is none, since an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def unframed(data: bytes) -> bytes:
    """What whole chunks carry, and as much as there is of the last one."""
    body, at = bytearray(), 0
    while (end := data.find(b"\r\n", at)) >= 0:
        try:
            length = int(data[at:end].partition(b";")[0], 16)
        except ValueError:
            break
        if length <= 0:
            break
        body += data[end + 2 : end + 2 + length]
        at = end + 4 + length
    return bytes(body)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the engine answered: {body[:500].decode('utf-8', 'replace')}"
