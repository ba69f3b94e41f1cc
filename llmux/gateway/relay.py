"""One request of one client on its way through: waiting, sent, streaming, ended.

Everything here runs inside callbacks of the event loop; nothing awaits and nothing owns a task. The
client's transport is written to directly with the engine's own bytes; only the head is ours.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from llmux.errors import Reason, Refused
from llmux.gateway import problems
from llmux.gateway.admission import Lease, Stage, Ticket
from llmux.gateway.incoming import Incoming
from llmux.gateway.upstream import EngineConnection, EngineFailure, EnginePool, ResponseHead

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol
    from llmux.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

# The engine's headers about its connection to us, and those that we write ourselves.
NOT_PASSED_ON = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-llmux-wait-ms",
        b"x-request-id",
    }
)


class Exchange(Ticket):
    """Ends once, in ``response_end``, ``refuse``, ``break_off`` or ``client_gone``."""

    __slots__ = (
        "_chunked", "_close", "_event_stream", "_front", "_gateway", "_incoming", "_status",
        "_transport", "_wait_ms", "connection",
    )  # fmt: skip

    def __init__(
        self, gateway: Gateway, front: FrontProtocol, incoming: Incoming, model: str
    ) -> None:
        now = gateway.clock()
        super().__init__(model, now, now + gateway.admission.wait_secs)
        self._gateway = gateway
        self._front: FrontProtocol | None = front
        self._incoming: Incoming | None = incoming
        self._transport: asyncio.Transport | None = None  # the client's, once an answer is begun
        self._status = 0  # of the answer begun; 0 = none yet
        self._chunked = False
        self._event_stream = False
        self._close = not incoming.keep_alive
        self._wait_ms = 0
        self.connection: EngineConnection | None = None

    # ---- what admission decided -----------------------------------------------------------------

    def admitted(self, lease: Lease, pool: EnginePool) -> None:
        assert self._incoming is not None, "the request is held until the first byte of an answer"
        waited = self._gateway.clock() - self.arrived
        self._wait_ms = int(waited * 1000)
        observer = self._gateway.observer
        if observer.waited is not None:
            observer.waited(self.model, waited)
        pool.send(self, unchunk=self._incoming.version_1_0)

    def refuse(self, problem: Refused) -> None:
        """End with an error: an answer of its own when none was begun, else see break_off."""
        if self._status:
            self.break_off(problem, between_chunks=self.between_chunks)
            return
        front, incoming = self._front, self._incoming
        if front is None or incoming is None:
            return
        self._wait_ms = int((self._gateway.clock() - self.arrived) * 1000)
        self._gateway.observer.answered(self.model, problems.status_of(problem))
        close = self._close or self._gateway.draining
        extra = self._own_headers(incoming.request_id, incoming.version_1_0, close)
        self._end(completed=False)
        front.write(problems.error_response(problem, extra=extra))
        front.exchange_done(close=close)

    def break_off(self, problem: Refused, *, between_chunks: bool) -> None:
        """End an answer that was begun: an event stream gets an error event, anything else, and a
        stream cut inside a chunk, a connection that ends too early, which every client notices."""
        front = self._front
        self._end(completed=False)
        if front is None:
            return
        self._gateway.observer.broken[self.model] += 1
        if self._event_stream and (between_chunks or not self._chunked):
            event = problems.error_event(problem)
            if self._chunked:
                event = b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
            front.write(event)
            front.exchange_done(close=True)
        else:
            front.abort()

    @property
    def between_chunks(self) -> bool:
        return self.connection is not None and self.connection.between_chunks

    def client_gone(self) -> None:
        """The engine learns it by losing its connection; vLLM then stops computing."""
        self._gateway.observer.abandoned[self.model] += 1
        self._end(completed=False)

    def _end(self, *, completed: bool) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
        self._front = self._transport = None
        self._incoming = None
        self._gateway.admission.leave(self, completed=completed)

    def drop_connection(self) -> None:
        """The engine is given up; nothing more is heard of it for this request."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()

    # ---- the client's pace ----------------------------------------------------------------------

    def pause(self) -> None:
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None:
            self.connection.resume()

    def unsent(self) -> int:
        """Bytes of the answer that the client has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    # ---- the engine's answer (upstream.Sink) ----------------------------------------------------

    def payload(self) -> tuple[bytes, bytes]:
        assert self._incoming is not None, "the request is held until the first byte of an answer"
        return self._incoming.engine_head(), self._incoming.body

    def wants_connection(self) -> bool:
        return self.stage is Stage.IN_FLIGHT and self.connection is None and self._status == 0

    def response_head(self, head: ResponseHead, first: bytes) -> None:
        incoming, front = self._incoming, self._front
        assert incoming is not None and front is not None, "an answer is for a request"
        self.repeatable = False
        self._incoming = None  # frees the body: a stream may last for minutes
        self._status = head.status
        self._chunked = head.chunked and not incoming.version_1_0
        unsized = head.until_close or (head.chunked and incoming.version_1_0)
        self._close = self._close or unsized or self._gateway.draining
        lines = [b"HTTP/1.1 " + head.status_line]
        for name, value in head.headers:
            lowered = name.lower()
            if lowered not in NOT_PASSED_ON:
                lines.append(name + b": " + value)
            if lowered == b"content-type" and value.startswith(b"text/event-stream"):
                self._event_stream = True
        if self._chunked:
            lines.append(b"transfer-encoding: chunked")
        lines.append(self._own_headers(incoming.request_id, incoming.version_1_0, self._close))
        lines.append(first)
        self._transport = front.transport
        front.write(b"\r\n".join(lines))
        if front.writing_paused:
            self.pause()
        if first and self.lease is not None:
            self.lease.line.progress += 1
        self._gateway.observer.answered(self.model, head.status)

    def _own_headers(self, request_id: bytes, version_1_0: bool, close: bool) -> bytes:
        connection = b""
        if close:
            connection = b"connection: close\r\n"
        elif version_1_0:
            connection = b"connection: keep-alive\r\n"
        return b"x-request-id: %b\r\nx-llmux-wait-ms: %d\r\n%b" % (
            request_id, self._wait_ms, connection,
        )  # fmt: skip

    def response_bytes(self, data: bytes) -> None:
        # The hot path of every stream: one call per chunk.
        if self._transport is not None and self.lease is not None:
            self._transport.write(data)
            self.lease.line.progress += 1

    def response_end(self) -> None:
        front = self._front
        self._end(completed=True)
        if front is not None:
            front.exchange_done(close=self._close)

    def response_failed(self, failure: EngineFailure) -> None:
        self._gateway.engine_failed(self, failure)

    def failure_problem(self, failure: EngineFailure) -> Refused:
        reason = Reason.ENGINE_DIED if failure.connected else Reason.ENGINE_UNREACHABLE
        return Refused(reason, f'cannot get an answer from model "{self.model}": {failure.error}')
