"""One request of one client on its way through: waiting, sent, streaming, ended.

Everything here runs inside callbacks of the event loop; nothing awaits and nothing owns a task. The
client's transport is written to directly with the engine's own bytes; only the head is ours.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING

from llmux.errors import Reason, Refused
from llmux.gateway import problems
from llmux.gateway.answer_head import NO_BODY, AnswerHead
from llmux.gateway.forms import Upload
from llmux.gateway.incoming import Incoming
from llmux.gateway.pool import EnginePool
from llmux.gateway.reshaping import RenamingConnection, UnchunkingConnection
from llmux.gateway.tickets import Lease, Stage, Ticket
from llmux.gateway.upstream import EngineConnection, EngineFailure

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol
    from llmux.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

# The id of an answer that the engine keeps is its first; vLLM writes it at the very beginning.
LOOK_BYTES = 4096
_RESPONSE_ID = re.compile(rb'"id":\s*"([A-Za-z0-9_-]{1,200})"')


class Exchange(Ticket):
    """Ends once, in ``response_end``, ``refuse``, ``break_off`` or ``client_gone``."""

    __slots__ = (
        "_alias", "_anthropic", "_chunked", "_close", "_event_stream", "_first_due", "_front",
        "_gateway", "_incoming", "_status", "_times", "_transport", "_wait_ms", "connection",
        "counted", "key", "queued", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        gateway: Gateway,
        front: FrontProtocol,
        incoming: Incoming,
        model: str,
        *,
        alias: str | None = None,
    ) -> None:
        now = gateway.clock()
        super().__init__(model, now, now + gateway.admission.wait_secs)
        if (patience := incoming.head.timeout_secs) is not None:
            self.limit = now + patience
            self.deadline = min(self.deadline, self.limit)
        match = incoming.match
        self._anthropic = match is not None and match.route.anthropic
        self._alias = alias  # what the client called the model; None: by its own name
        self._gateway = gateway
        self._times = gateway.observer.times_of(model)
        self._front: FrontProtocol | None = front
        self._incoming: Incoming | None = incoming
        self._transport: asyncio.Transport | None = None  # the client's, once an answer is begun
        self._status = 0  # of the answer begun; 0 = none yet
        self._chunked = False
        self._event_stream = False
        self._close = not incoming.keep_alive
        self._wait_ms = 0
        self._first_due = False  # the head came alone
        self.key = incoming.key
        self.counted = False  # in what the key uses
        self.queued = False  # in what of it waits
        self.connection: EngineConnection | None = None
        self.request_id = incoming.request_id

    # ---- what admission decided -----------------------------------------------------------------

    def admitted(self, lease: Lease, pool: EnginePool) -> None:
        assert self._incoming is not None, "the request is held until the first byte of an answer"
        waited = self._gateway.clock() - self.arrived
        self._wait_ms = int(waited * 1000)
        self._times.waits.observe(waited)
        pool.send(self)

    def wait_begins(self) -> None:
        """Admission made it wait."""

    def still_waiting(self) -> None:
        """It waits for longer than a client may want to hear nothing."""

    def refuse(self, problem: Refused) -> None:
        """End with an error: an answer of its own when none was begun, else see break_off."""
        if self._status:
            self.break_off(problem, between_chunks=self.between_chunks)
            return
        front, incoming = self._front, self._incoming
        if front is None or incoming is None:
            return
        self._wait_ms = int((self._gateway.clock() - self.arrived) * 1000)
        self._waited_in_vain()
        self._gateway.observer.answered(self.model, problems.status_of(problem))
        self._gateway.log.refused(problem, request=self.request_id, model=self.model)
        close = self._close or self._gateway.draining
        extra = self._own_headers(incoming, close)
        self._end(completed=False)
        front.write(problems.error_response(problem, extra=extra, anthropic=self._anthropic))
        front.exchange_done(close=close)

    def break_off(self, problem: Refused, *, between_chunks: bool) -> None:
        """End an answer that was begun: an event stream gets an error event, anything else, and a
        stream cut inside a chunk, a connection that ends too early, which every client notices."""
        front = self._front
        self._end(completed=False)
        if front is None:
            return
        self._gateway.observer.broken[self.model] += 1
        self._gateway.log.broken(problem, request=self.request_id, model=self.model)
        if self._event_stream and (between_chunks or not self._chunked):
            event = problems.error_event(problem, anthropic=self._anthropic)
            if self._chunked:
                event = b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
            front.write(event)
            front.exchange_done(close=True)
        else:
            front.abort()

    @property
    def response_id(self) -> str | None:
        """Of the response that the path names."""
        match = None if self._incoming is None else self._incoming.match
        return None if match is None else match.response_id

    @property
    def between_chunks(self) -> bool:
        return self.connection is not None and self.connection.between_chunks

    def client_gone(self) -> None:
        """The engine learns it by losing its connection; vLLM then stops computing."""
        self._waited_in_vain()
        self._gateway.observer.abandoned[self.model] += 1
        self._end(completed=False)

    def _waited_in_vain(self) -> None:
        """Who was let through was counted then; who was refused at once did not wait."""
        if self.stage is not Stage.NEW and self.lease is None:
            self._times.waits.observe(self._gateway.clock() - self.arrived)

    def _end(self, *, completed: bool) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
        self._front = self._transport = None
        self._incoming = None
        if self.counted and self.key is not None:
            self.counted = False
            self.key.end(waited=self.queued)
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

    def payload(self) -> tuple[bytes, bytes | Upload]:
        incoming = self._incoming
        assert incoming is not None, "the request is held until the first byte of an answer"
        return incoming.engine_head(), incoming.upload or incoming.body

    def connection_type(self) -> type[EngineConnection]:
        if self._alias is not None:
            return RenamingConnection
        incoming = self._incoming
        assert incoming is not None, "the request is held until the first byte of an answer"
        return UnchunkingConnection if incoming.head.version_1_0 else EngineConnection

    def renaming(self) -> tuple[str, str, bool]:
        """The model's name, what to call it, and whether in chunks."""
        assert self._incoming is not None, "the request is held until the first byte of an answer"
        return self.model, self._alias or self.model, not self._incoming.head.version_1_0

    def wants_connection(self) -> bool:
        return self.stage is Stage.IN_FLIGHT and self.connection is None and self._status == 0

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        incoming, front = self._incoming, self._front
        assert incoming is not None and front is not None, "an answer is for a request"
        self.repeatable = False
        self._incoming = None  # frees the body: a stream may last for minutes
        status = self._status = head.status
        self._event_stream = head.event_stream
        if not length or head.chunked or self._alias is not None:  # renamed: of another length
            length = self._frame(head, length, incoming)
        close = self._close = self._close or self._gateway.draining
        self._transport = front.transport
        own = self._own_headers(incoming, close)
        front.write(b"%b%b%b\r\n%b" % (head.lines, length, own, first))
        if front.writing_paused:
            self.pause()
        self._gateway.observer.answered(self.model, status)
        if first:
            if self.lease is not None:
                self.lease.line.progress += 1
            self._times.first_tokens.observe(self._gateway.clock() - self.arrived)
        else:
            self._first_due = True

    def _frame(self, head: AnswerHead, length: bytes, incoming: Incoming) -> bytes:
        """The line that says where the body ends, where that is not the engine's own length."""
        version_1_0, until_close = incoming.head.version_1_0, self._until_close
        renamed = self._alias is not None and head.status not in NO_BODY
        chunked = head.chunked or (renamed and not until_close)
        self._chunked = chunked and not version_1_0
        self._close = self._close or until_close or (chunked and version_1_0)
        if self._chunked:
            return b"transfer-encoding: chunked\r\n"
        return b"" if chunked else length

    @property
    def _until_close(self) -> bool:
        assert self.connection is not None, "asked while an answer is being read"
        return self.connection.until_close

    def _own_headers(self, incoming: Incoming, close: bool) -> bytes:
        more = b""
        if close:
            more = b"connection: close\r\n"
        elif incoming.head.version_1_0:
            more = b"connection: keep-alive\r\n"
        if incoming.head.origin and self._gateway.cors is not None:
            more += self._gateway.cors.headers(incoming.head.origin)
        return b"x-request-id: %b\r\nx-llmux-wait-ms: %d\r\nx-llmux-switch: %b\r\n%b" % (
            incoming.request_id, self._wait_ms, self.switch, more,
        )  # fmt: skip

    def response_bytes(self, data: bytes) -> None:
        # The hot path of every stream: one call per chunk.
        if self._first_due:
            self._first_due = False
            self._times.first_tokens.observe(self._gateway.clock() - self.arrived)
        if self._transport is not None and self.lease is not None:
            self._transport.write(data)
            self.lease.line.progress += 1

    def response_end(self) -> None:
        front = self._front
        self._times.durations.observe(self._gateway.clock() - self.arrived)
        self._end(completed=True)
        if front is not None:
            front.exchange_done(close=self._close)

    def response_failed(self, failure: EngineFailure) -> None:
        self._gateway.engine_failed(self, failure)

    def failure_problem(self, failure: EngineFailure) -> Refused:
        reason = Reason.ENGINE_DIED if failure.connected else Reason.ENGINE_UNREACHABLE
        return Refused(reason, f'cannot get an answer from model "{self.model}": {failure.error}')


class KeptExchange(Exchange):
    """A request whose answer the engine keeps under an id, which is looked for in passing."""

    __slots__ = ("_seen",)

    def __init__(
        self,
        gateway: Gateway,
        front: FrontProtocol,
        incoming: Incoming,
        model: str,
        *,
        alias: str | None = None,
    ) -> None:
        super().__init__(gateway, front, incoming, model, alias=alias)
        self._seen: bytes | None = b""  # None: found, or not to be found

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        self._look(first)
        super().response_head(head, length, first)

    def response_bytes(self, data: bytes) -> None:
        # Before the client has it, who may ask another worker for it at once.
        if self._seen is not None:
            self._look(data)
        super().response_bytes(data)

    def _look(self, data: bytes) -> None:
        if self._seen is None:
            return
        self._seen += data[:LOOK_BYTES]
        if (found := _RESPONSE_ID.search(self._seen)) is not None:
            self._gateway.keeps_response(found[1].decode(), self.model)
        if found is not None or len(self._seen) >= LOOK_BYTES:
            self._seen = None
