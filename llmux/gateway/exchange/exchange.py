"""One request of one client: waiting, sent, streaming, ended.

Everything here runs inside callbacks of the event loop; nothing awaits and nothing owns a task. The
client's transport is written to directly with the engine's own bytes; only the head is ours.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from llmux.errors import Refused
from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.admission.queue import Stage, Ticket
from llmux.gateway.engine.answer_head import NO_BODY, AnswerHead
from llmux.gateway.engine.connection import EngineConnection, EngineFailure
from llmux.gateway.engine.pool import EnginePool
from llmux.gateway.engine.request import Delivery, EngineRequest, Rename
from llmux.gateway.exchange.held_error import MAX_HELD, HeldError
from llmux.gateway.exchange.keep_alive import HEAD, KeepAlive, framed
from llmux.gateway.exchange.loading_text import ChatText
from llmux.gateway.exchange.response_id import ResponseIdFinder
from llmux.gateway.http import problems
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.routes import Route
from llmux.gateway.worker import Worker


class Client(Protocol):
    """The connection of the request. ``deadline``: the time, by the worker's clock, at which it
    calls ``Exchange.send_keep_alive``; 0 = never."""

    transport: asyncio.Transport | None
    writing_paused: bool
    deadline: float

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def exchange_done(self, *, close: bool) -> None: ...


class Dispatcher(Protocol):
    """The part of the dispatch that an exchange calls."""

    def engine_failed(self, exchange: Exchange, failure: EngineFailure) -> None: ...
    def engine_erred(self, exchange: Exchange) -> None: ...
    def response_stored(self, response_id: str, model: str, key: KeyUse | None) -> None: ...


class Exchange(Ticket):
    """A sink of the engine pool. Ends once, in ``response_end``, ``refuse``, ``break_off`` or
    ``client_gone``.

    Parts that most exchanges lack: ``_alias`` (the client's name for the model), ``_response_id``
    (looks for the id of a stored response), ``_keep_alive`` (comments before the stream begins).
    """

    __slots__ = (
        "_alias", "_anthropic", "_chunked", "_client", "_close", "_dispatch", "_event_stream",
        "_first_due", "_held", "_inspecting", "_keep_alive", "_request", "_response_id", "_status",
        "_times", "_transport", "_wait_ms", "_worker", "connection", "counted",
        "keep_alive_secs", "key", "queued", "request_id", "sought",
    )  # fmt: skip
    _wait_ms: int  # once the wait is over
    _first_due: bool  # once a response is begun: no byte of the body was received yet …
    _inspecting: bool  # … and: response_bytes has more to do than to pass on

    def __init__(
        self,
        worker: Worker[Exchange],
        dispatch: Dispatcher,
        client: Client,
        request: Incoming,
        route: Route,
        model: str,
        *,
        alias: str | None,
        stream: bool,
    ) -> None:
        now = worker.clock()
        Ticket.__init__(self, model, now, now + worker.admission.wait_secs)
        if (timeout := request.head.timeout_secs) is not None:
            self.limit = now + timeout
            self.deadline = min(self.deadline, self.limit)
        self._anthropic = route.anthropic
        self._alias = alias
        self._worker = worker
        self._dispatch = dispatch
        self._times = worker.observer.times_of(model)
        self._client: Client | None = client
        self._request: Incoming | None = request  # until the response begins
        self._transport: asyncio.Transport | None = None  # the client's, once a response is begun
        self._status = 0  # of the response begun; 0 = none yet
        self._chunked = False
        self._event_stream = False
        self._close = not request.keep_alive
        self._response_id = ResponseIdFinder() if route.keeps else None
        self._keep_alive: KeepAlive | None = None
        if stream and route.streams and not request.head.version_1_0:
            self._keep_alive = self._signs_of_life(request, route, alias or model)
        self._held: HeldError | None = None
        self.key = request.key
        self.counted = False  # counted against the key's max_in_flight
        self.queued = False  # counted against the key's max_waiting
        self.sought: str | None = None  # id of a response whose model or key is not known here
        self.connection: EngineConnection | None = None
        self.request_id = request.request_id
        self.keep_alive_secs = request.head.keep_alive_secs

    # ---- admission's decision -------------------------------------------------------------------

    def admitted(self, pool: EnginePool) -> None:
        waited = self._worker.clock() - self.arrived
        self._wait_ms = int(waited * 1000)
        self._held = None  # of a former engine
        self._times.waits.observe(waited)
        if self._keep_alive is not None:
            self.wait_begins()
        pool.send(self._engine_request(), self)

    def _engine_request(self) -> EngineRequest:
        request = self._request
        assert request is not None, "the request is held until the response begins"
        head, body = request.engine_head(), request.upload or request.body
        version_1_0 = request.head.version_1_0
        if self._alias is not None:
            rename = Rename(self.model, self._alias, chunked=not version_1_0)
            return EngineRequest(head, body, Delivery.RENAMED, rename)
        if version_1_0:
            return EngineRequest(head, body, Delivery.UNCHUNKED)
        return EngineRequest(head, body)

    def refuse(self, problem: Refused) -> None:
        """End with an error response, or as ``break_off`` when a response was begun."""
        if self._status:
            self.break_off(problem, between_chunks=self.between_chunks)
            return
        client, request = self._client, self._request
        if client is None or request is None:
            return
        self._wait_ms = int((self._worker.clock() - self.arrived) * 1000)
        self._observe_failed_wait()
        self._worker.observer.answered(self.model, problems.status_of(problem))
        self._worker.log.refused(problem, request=self.request_id, model=self.model)
        close = self._close or self._worker.draining
        extra = self._own_headers(request, close)
        self._end(completed=False)
        client.write(problems.error_response(problem, extra=extra, anthropic=self._anthropic))
        client.exchange_done(close=close)

    def break_off(self, problem: Refused, *, between_chunks: bool) -> None:
        """End a response that was begun: an event stream with an error event; anything else, and a
        stream cut inside a chunk, by closing too early, which every client detects."""
        client = self._client
        self._end(completed=False)
        if client is None:
            return
        self._worker.observer.broken[self.model] += 1
        self._worker.log.broken(problem, request=self.request_id, model=self.model)
        if self._event_stream and (between_chunks or not self._chunked):
            event = problems.error_event(problem, anthropic=self._anthropic)
            if self._chunked:
                event = framed(event) + b"0\r\n\r\n"
            client.write(event)
            client.exchange_done(close=True)
        else:
            client.abort()

    @property
    def between_chunks(self) -> bool:
        if self._commented and self.repeatable:
            return True  # only comments were sent
        return self.connection is not None and self.connection.between_chunks

    def client_gone(self) -> None:
        """The client disconnected. The engine's connection is closed, so vLLM stops computing."""
        self._observe_failed_wait()
        self._worker.observer.abandoned[self.model] += 1
        self._end(completed=False)

    def _observe_failed_wait(self) -> None:
        """Admitted requests were observed on admission; immediate refusals never waited."""
        if self.stage is not Stage.NEW and self.lease is None:
            self._times.waits.observe(self._worker.clock() - self.arrived)

    def _end(self, *, completed: bool) -> None:
        if self.connection is not None:
            self.drop_connection()
        self._client = self._transport = None
        self._request = self._held = None
        if self.counted and self.key is not None:
            self.counted = False
            self.key.end(waited=self.queued)
        self._worker.admission.leave(self, completed=completed)

    def drop_connection(self) -> None:
        """Close the connection to the engine; the sink is not called again."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()

    # ---- keep-alive comments --------------------------------------------------------------------

    def _signs_of_life(self, request: Incoming, route: Route, name: str) -> KeepAlive | None:
        seconds, standing = self._worker.keep_alive_secs, self._worker.standing
        if standing is not None and route.chat:
            number = request.request_id.decode()
            text = ChatText(standing, name, number, seconds)
            return KeepAlive(name, seconds, anthropic=False, text=text)
        return KeepAlive(self.model, seconds, anthropic=route.anthropic) if seconds else None

    def wait_begins(self) -> None:
        """For admission or for the first byte of the response."""
        if self._keep_alive is not None and self._client is not None:
            self._client.deadline = self._worker.clock() + self._keep_alive.pause

    def send_keep_alive(self) -> None:
        """Called when the client's deadline passed."""
        client, keep_alive = self._client, self._keep_alive
        if client is None or keep_alive is None or not self.repeatable:
            return
        chunk = keep_alive.chunk(self, self._worker.clock())
        if chunk and not keep_alive.started:
            assert self._request is not None, "the request is held until the response begins"
            keep_alive.started = True
            self._status = 200
            self._event_stream = self._chunked = True
            self._wait_ms = int((self._worker.clock() - self.arrived) * 1000)
            own = self._own_headers(self._request, self._close)
            client.write(HEAD + own + b"\r\n")
            self._worker.observer.answered(self.model, 200)
        if chunk:
            client.write(chunk)
        self.wait_begins()

    @property
    def _commented(self) -> bool:
        return self._keep_alive is not None and self._keep_alive.started

    # ---- the client's pace ----------------------------------------------------------------------

    def pause(self) -> None:
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None:
            self.connection.resume()

    def unsent(self) -> int:
        """Bytes of the response in the client's write buffer."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    # ---- the engine's response (Sink) -----------------------------------------------------------

    def wants_connection(self) -> bool:
        return self.stage is Stage.IN_FLIGHT and self.connection is None and self.repeatable

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        if head.status == 500 and (length or head.chunked):
            self._held, self._inspecting = HeldError(head, length), True
            self.response_bytes(first)
        else:
            self._begin(head, length, first)

    def pass_on(self) -> None:
        """What was held of an engine that lives is its answer, as far as it has come."""
        if (held := self._held) is not None:
            self._held = None
            self._begin(held.head, held.length, bytes(held.body))

    @property
    def holds(self) -> bool:
        return self._held is not None

    def _begin(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        request, client = self._request, self._client
        assert request is not None and client is not None, "a response is begun once, for a client"
        if self.deaths:
            self._worker.admission.answered(self)
        self.repeatable = False
        self._request = None  # frees the body: a stream may last for minutes
        self._transport = client.transport
        self._first_due = self._inspecting = True
        if client.writing_paused:
            self.pause()
        if self._keep_alive is not None:
            if self._keep_alive.started:
                self._continue_stream(head, request, first)
                return
            self._keep_alive = None  # its purpose is over; a stream may last for minutes
        if first:
            self._look_at(first)
            if self.lease is not None:
                self.lease.queue.progress += 1
        self._status = head.status
        self._event_stream = head.event_stream
        if not length or head.chunked or self._alias is not None:  # renamed: of another length
            length = self._frame(head, length, request)
        close = self._close = self._close or self._worker.draining
        own = self._own_headers(request, close)
        if self._transport is not None:
            self._transport.write(b"%b%b%b\r\n%b" % (head.lines, length, own, first))
        self._worker.observer.answered(self.model, head.status)

    def _continue_stream(self, head: AnswerHead, request: Incoming, first: bytes) -> None:
        """The client has a head already. Only an event stream can follow it, in chunks; the body
        of any other response is collected and becomes an error event."""
        assert self._keep_alive is not None, "comments were sent"
        if head.status != 200 or not head.event_stream:
            renamed = self._alias is not None and not self._until_close
            self._keep_alive.collects(in_chunks=head.chunked or renamed)
        elif not head.chunked:  # a connection that renames makes chunks of what has a length
            self._keep_alive.frames = self._alias is None or self._until_close
        if first:
            self.response_bytes(first)

    def _frame(self, head: AnswerHead, length: bytes, request: Incoming) -> bytes:
        """The header line about the body's end, where it is not the engine's own length."""
        version_1_0, until_close = request.head.version_1_0, self._until_close
        renamed = self._alias is not None and head.status not in NO_BODY
        chunked = head.chunked or (renamed and not until_close)
        self._chunked = chunked and not version_1_0
        self._close = self._close or until_close or (chunked and version_1_0)
        if self._chunked:
            return b"transfer-encoding: chunked\r\n"
        return b"" if chunked else length

    @property
    def _until_close(self) -> bool:
        # Without one the response was held, which only one with an end of its own is.
        return self.connection is not None and self.connection.until_close

    def _own_headers(self, request: Incoming, close: bool) -> bytes:
        more = b""
        if close:
            more = b"connection: close\r\n"
        elif request.head.version_1_0:
            more = b"connection: keep-alive\r\n"
        if request.head.origin and self._worker.cors is not None:
            more += self._worker.cors.headers(request.head.origin)
        return b"x-request-id: %b\r\nx-llmux-wait-ms: %d\r\nx-llmux-switch: %b\r\n%b" % (
            request.request_id, self._wait_ms, self.switch, more,
        )  # fmt: skip

    def response_bytes(self, data: bytes) -> None:
        # The hot path of every stream: one call per chunk.
        if self._inspecting and not (data := self._inspect(data)):
            return
        if self._transport is not None and self.lease is not None:
            self._transport.write(data)
            self.lease.queue.progress += 1

    def _inspect(self, data: bytes) -> bytes:
        """The first bytes of the body, and all that is framed here. Returns what is passed on."""
        if self._held is not None:
            self._held.body += data
            if len(self._held.body) > MAX_HELD:
                self.pass_on()
            return b""
        keep_alive = self._keep_alive
        if keep_alive is not None and keep_alive.error is not None:
            keep_alive.collect(data)
            return b""
        self._look_at(data)
        if keep_alive is not None and keep_alive.frames:
            self._inspecting, data = True, framed(data)
        return data

    def _look_at(self, data: bytes) -> None:
        """The first bytes of a body that is passed on, before they are sent: the client may use a
        response's id on another worker immediately."""
        if self._first_due:
            self._first_due = False
            self._times.first_tokens.observe(self._worker.clock() - self.arrived)
        finder = self._response_id
        self._inspecting = finder is not None
        if finder is not None:
            if (response_id := finder.feed(data)) is not None:
                self._dispatch.response_stored(response_id, self.model, self.key)
            self._inspecting = not finder.done

    def response_end(self) -> None:
        if self._held is not None:
            self._dispatch.engine_erred(self)
            return
        if self._keep_alive is not None and self._keep_alive.error is not None:
            self.connection = None
            self.break_off(self._keep_alive.problem(), between_chunks=True)
            return
        client = self._client
        self._times.durations.observe(self._worker.clock() - self.arrived)
        self._end(completed=True)
        if client is not None:
            if self._keep_alive is not None and self._keep_alive.frames:
                client.write(b"0\r\n\r\n")
            client.exchange_done(close=self._close)

    def response_failed(self, failure: EngineFailure) -> None:
        self._dispatch.engine_failed(self, failure)
