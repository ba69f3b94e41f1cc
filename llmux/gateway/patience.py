"""Streaming clients that wait long: a sign of life now and then, as comments of the event stream.

The price is that the status goes out before the answer is known: after the first comment it is 200,
and whatever fails then is told by an error event in the stream.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llmux.errors import Reason, Refused
from llmux.gateway.answer_head import AnswerHead
from llmux.gateway.incoming import Incoming
from llmux.gateway.relay import KeptExchange
from llmux.gateway.tickets import Stage

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol
    from llmux.gateway.gateway import Gateway

MAX_ERROR = 64 * 1024  # of an engine's answer that is passed on inside an event


def wants_stream(incoming: Incoming) -> bool:
    """Whether the answer will be an event stream, in chunks."""
    if incoming.head.version_1_0 or b'"stream"' not in incoming.body:
        return False
    try:
        parsed = json.loads(incoming.body)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and parsed.get("stream") is True


class PatientExchange(KeptExchange):
    """``_early``: the head is out, and no engine has answered yet."""

    __slots__ = ("_collected", "_early", "_every")

    def __init__(
        self,
        gateway: Gateway,
        front: FrontProtocol,
        incoming: Incoming,
        model: str,
        **more: Any,
    ) -> None:
        super().__init__(gateway, front, incoming, model, **more)
        if incoming.match is None or not incoming.match.route.keeps:
            self._seen = None
        self._early = False
        self._every = gateway.config.gateway.keep_alive_comment_secs
        self._collected: bytearray | None = None

    def wait_begins(self) -> None:
        if self._front is not None:
            self._front.deadline = self._gateway.clock() + self._every

    def still_waiting(self) -> None:
        front, incoming = self._front, self._incoming
        if front is None or incoming is None or self.stage is not Stage.WAITING:
            return
        if not self._early:
            self._begin(front, incoming)
        comment = f": waiting for {self.model}\n\n".encode()
        front.write(b"%x\r\n%b\r\n" % (len(comment), comment))
        self.wait_begins()

    def _begin(self, front: FrontProtocol, incoming: Incoming) -> None:
        self._early = True
        self._status = 200
        self._event_stream = self._chunked = True
        self._wait_ms = int((self._gateway.clock() - self.arrived) * 1000)
        front.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\nx-accel-buffering: no\r\ntransfer-encoding: chunked\r\n"
            + self._own_headers(incoming, self._close)
            + b"\r\n"
        )
        self._gateway.observer.answered(self.model, 200)

    # ---- what changes once the head is out ------------------------------------------------------

    @property
    def between_chunks(self) -> bool:
        return self.repeatable or super().between_chunks

    def wants_connection(self) -> bool:
        return self.stage is Stage.IN_FLIGHT and self.connection is None and self.repeatable

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        if not self._early:
            super().response_head(head, length, first)
            return
        front = self._front
        assert front is not None, "an answer is for a request"
        self.repeatable = False
        self._incoming = None
        framed = head.chunked or (self._alias is not None and not self._until_close)
        if head.status != 200 or not framed or not head.event_stream:
            self._collected = bytearray(first)
            return
        self._transport = front.transport
        if front.writing_paused:
            self.pause()
        if first:
            self.response_bytes(first)

    def response_bytes(self, data: bytes) -> None:
        if self._collected is None:
            super().response_bytes(data)
        elif len(self._collected) <= MAX_ERROR:
            self._collected += data

    def response_end(self) -> None:
        if self._collected is None:
            super().response_end()
            return
        problem = Refused(Reason.BAD_REQUEST, _told(bytes(self._collected)))
        self.connection = None
        self.break_off(problem, between_chunks=True)


def _told(body: bytes) -> str:
    """The message of an engine's error."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the engine answered: {body[:500].decode('utf-8', 'replace')}"
