"""One HTTP/1.x connection of a client. Takes inference requests, hands the rest to Sanic.

Sanic alone spends 79 µs on a small POST (2 cores, Python 3.11, uvloop), 12,700/s per core; the goal
for a whole relayed request is 15,000/s. So this subclass of Sanic's protocol takes the inference
routes itself without a task or a coroutine, and hands every other request to Sanic.

Requests of one connection are answered in order, one at a time; pipelined ones wait in ``_queue``.
"""

from __future__ import annotations

from typing import Any

import httptools

from llmux.errors import Reason, Refused
from llmux.gateway.client.authorize import authorize
from llmux.gateway.client.body import MAX_PIECES_BYTES, BodyReceiver
from llmux.gateway.client.sanic_bridge import SanicBridge
from llmux.gateway.client.turns import SLICE, Reading
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.http import openapi, problems
from llmux.gateway.http.heads import BadHead
from llmux.gateway.http.replies import options_response, refusal
from llmux.gateway.http.request import Incoming, new_request_id, plain_head
from llmux.gateway.http.request_head import Headers, HeadReader

MAX_HEAD = 16_000  # below Sanic's ceiling of 16384, which sees the head again for its own routes
MAX_QUEUED = 16  # pipelined requests held before reading is paused …
MAX_QUEUED_BYTES = 1024 * 1024  # … and the bytes of their bodies
RECEIVE_SECS = 60.0  # for a head, for a short body, and for each window of a longer one …
RECEIVE_RATE = 4096  # … in which this many bytes per second must be received
KEEP_ALIVE_SECS = 120.0  # for an idle connection
FIRST_SECS = 1.0  # on a stop, for a new connection to send its first request
FLUSH_SECS = 30.0  # for a closed connection's last bytes to a client that reads slowly
LINGER_SECS = 2.0  # after an early refusal: time for the client to read it before the reset


class ClientConnection(SanicBridge):
    """``exchange``: the request being answered. ``deadline``: for ``expire``; 0 = none."""

    __slots__ = (
        "_advancing", "_at_once", "_began", "_body", "_current", "_discarding", "_fed",
        "_head_bytes", "_headers", "_parser", "_queue", "_reader", "_reading", "_sanic_closes",
        "_url", "_window", "deadline", "dispatch", "exchange", "worker", "writing_paused",
    )  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dispatch: Dispatch = self.app.ctx.dispatch
        self.worker = self.dispatch.worker
        self.exchange: Exchange | None = None
        self.writing_paused = False
        self.deadline = 0.0  # by the worker's clock; checked by the server's sweep
        self._parser: Any = httptools.HttpRequestParser(self)
        self._reader = HeadReader()
        self._queue: list[Incoming] = []  # a deque takes 700 bytes more, of each connection
        self._current: Incoming | None = None  # being received
        self._headers: Headers | None = None  # headers of ``_current``; None once complete
        self._head_bytes = self._window = 0  # … and of the body before the present window
        self._at_once = False  # it was received in one piece no larger than a head may be
        self._fed = 0  # the size of the piece being parsed
        self._url = b""
        self._body = BodyReceiver(self.worker)
        self._began = 0.0  # of the present window; 0 = no request was received yet
        self._discarding = False  # further input is discarded
        self._advancing = False
        self._sanic_closes = False  # the response that Sanic is writing says so

    # ---- asyncio's callbacks --------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._reading = Reading(self.worker.turns, transport)
        self.worker.clients += 1
        self.worker.client_came.set()
        if self.worker.clients > self.worker.max_connections:
            self._refuse_connection()
            return
        late = self.worker.draining  # a TLS handshake may end after the stop began
        self.deadline = self.worker.clock() + (FIRST_SECS if late else KEEP_ALIVE_SECS)

    def _refuse_connection(self) -> None:
        problem = Refused(
            Reason.QUEUE_FULL,
            f"cannot accept the connection: {self.worker.max_connections} are open",
            hint="try again later; the limit is gateway.max_connections",
            retry_after=1.0,
        )
        self._reject(problem)
        self._next()

    def data_received(self, data: bytes) -> None:
        if len(data) > SLICE:
            self._reading.in_slices(data, self.data_received)
            return
        if self._discarding:
            self._reading.wait_turn()
            return
        head = self._headers
        self._fed = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_plainly(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._reject(problems.HttpRefused(400, f"cannot read the request: {error}"))
        if self._headers is not None:  # the head is not complete
            self._at_once = False
            if self._headers is head:  # all of the data belongs to it
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD:
                    self._reject_head()
        if self._current is not None:
            if self.exchange is None and not self.sanic_busy:
                self._check_rate()
            if self._body.size > MAX_PIECES_BYTES:
                self._reading.wait_turn()
        if self._queue:
            self._next()

    def _check_rate(self) -> None:
        """Begin another window when this one brought enough."""
        if self._body.size - self._window >= RECEIVE_RATE * RECEIVE_SECS:
            self._window = self._body.size
            self._began = self.worker.clock()
        self.deadline = self._began + RECEIVE_SECS

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.worker.clients -= 1
        self.worker.client_left.set()
        self.deadline = 0.0
        self._parser = None  # parser and protocol refer to each other
        self._queue.clear()
        self._current = None
        self._body.pieces = []
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.writing_paused = True
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.writing_paused = False
        if self.exchange is not None:
            self.exchange.resume()

    # ---- httptools' callbacks: one request being received ---------------------------------------

    def on_message_begin(self) -> None:
        if self._discarding:
            return
        self._current = Incoming(self.worker.bodies)
        self._headers = self._current.headers
        self._began = self.worker.clock()
        self._window = self._head_bytes = 0
        self._at_once = self._fed <= MAX_HEAD
        self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._headers is not None:  # else a trailer, which is dropped
            self._headers.append((name, value))

    def _reject_head(self) -> None:
        self._reject(problems.HttpRefused(431, f"the request head is larger than {MAX_HEAD} bytes"))

    def on_headers_complete(self) -> None:
        incoming = self._current
        parser = self._parser
        if incoming is not None and parser.should_upgrade() and parser.get_method() != b"CONNECT":
            return  # _read_plainly reads it again
        self._headers = None
        if incoming is None:
            return
        incoming.target = self._url
        if not self._at_once and incoming.head_bytes() > MAX_HEAD:
            self._reject_head()
            return
        incoming.keep_alive = parser.should_keep_alive()
        incoming.method = parser.get_method()
        try:
            incoming.read_head(parser.get_http_version(), self._reader)
        except BadHead as wrong:
            self._reject(problems.HttpRefused(400, str(wrong)))
            return
        incoming.find_route()
        try:
            authorize(incoming, self.worker, self.transport)
            self._body.begin(incoming)
        except Refused as problem:
            self._reject(problem)
            return
        if incoming.head.expects_continue and not self._busy():
            # A busy connection gets no 100: it would be written inside the previous response. The
            # client then sends the body after a timeout (RFC 9110 10.1.1).
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if self._current is None:
            return
        try:
            self._body.add(self._current, body)
        except Refused as problem:
            self._reject(problem)

    def on_message_complete(self) -> None:
        if self._current is None or self._headers is not None:  # see _read_plainly
            return
        incoming, self._current = self._current, None
        if self._body.pieces:
            self._body.join(incoming)
        self._queue.append(incoming)

    def _read_plainly(self, rest: memoryview) -> None:
        """An Upgrade request may be ignored (RFC 9110 7.8), but the parser takes the body for the
        other protocol's: a new parser reads the request without its Upgrade headers."""
        while self._headers is not None:
            plain = plain_head(self._parser, self._url, self._headers)
            self._parser = httptools.HttpRequestParser(self)
            try:
                self._parser.feed_data(plain)
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            except httptools.HttpParserError as error:
                self._reject(problems.HttpRefused(400, f"cannot read the request: {error}"))
                return
        if self._queue:  # CONNECT: the following bytes are not HTTP
            self._queue[-1].keep_alive = False
        self._stop_receiving()

    # ---- refusing while receiving ---------------------------------------------------------------

    def _reject(self, problem: Refused) -> None:
        """Refuse the request being received, after the queued ones, and discard further input."""
        if self._discarding:
            return
        # its frames refer to the body's last piece and to what keeps this, in a circle
        problem.__traceback__ = problem.__context__ = None
        incoming = self._current or Incoming()
        incoming.problem = problem
        incoming.drop_body()
        incoming.keep_alive = False
        incoming.request_id = incoming.request_id or new_request_id()
        self._queue.append(incoming)
        self._stop_receiving()

    def _stop_receiving(self) -> None:
        self._discarding = True
        self._current = self._headers = None
        self._body.pieces = []

    def stop_reading(self) -> None:
        """Answer the requests read so far and discard further input, which lets EOF be reported."""
        self._stop_receiving()
        if self.transport is not None:
            self._reading.release()

    # ---- one after the other --------------------------------------------------------------------

    def _busy(self) -> bool:
        return self.exchange is not None or self.sanic_busy or bool(self._queue)

    def _next(self) -> None:
        if self._advancing:
            return  # an immediate response calls this again; a loop instead of recursion
        self._advancing = True
        while self._queue and self.exchange is None and not self.sanic_busy:
            if self.transport is None or self.transport.is_closing():
                break
            self._start(self._queue.pop(0))
        self._advancing = False
        if (
            self._queue
            and not self._discarding
            and self.transport
            and not self.transport.is_closing()
        ):
            size = sum(len(incoming.body) for incoming in self._queue)
            if len(self._queue) > MAX_QUEUED or size > MAX_QUEUED_BYTES:
                self._reading.hold()

    def _start(self, incoming: Incoming) -> None:
        self.deadline = 0.0
        if incoming.problem is not None:
            self._answer_problem(incoming, incoming.problem)
        elif incoming.match is not None:
            try:
                exchange = self.exchange = self.dispatch.exchange(self, incoming, incoming.match)
            except Refused as problem:
                self._answer_problem(incoming, problem)
                return
            self.dispatch.submit(exchange)
        elif incoming.method == b"OPTIONS" and (methods := openapi.methods_of(incoming.path)):
            close = not incoming.keep_alive or self.worker.draining
            self.write(options_response(incoming, methods, self.worker.cors, close=close))
            self._answered(close=close)
        elif not incoming.target_is_readable():
            self._answer_problem(incoming, problems.HttpRefused(400, "cannot read the target"))
        else:
            self._pass_to_sanic(incoming)

    def _answer_problem(self, incoming: Incoming, problem: Refused) -> None:
        self.worker.observer.answered("", problems.status_of(problem))
        self.worker.log.refused(problem, request=incoming.request_id)
        close = not incoming.keep_alive or self.worker.draining
        self.write(refusal(incoming, problem, self.worker.cors, close=close))
        self._answered(close=close)

    def exchange_done(self, *, close: bool) -> None:
        """The exchange has written its response. Called exactly once, unless it aborted."""
        self.exchange = None
        self._answered(close=close)
        if self._queue:
            self._next()

    def _answered(self, *, close: bool) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        # In a hand-over a response that promised to keep the connection keeps it: a request may be
        # on its way already, and its response says close.
        close = close or self.worker.closing
        if close and (self._queue or self._current is not None):  # no response to these
            self._queue.clear()
            self._stop_receiving()
            self._reading.release()
        if self._discarding and not self._queue:
            # close() with unread bytes sends a reset, which can overtake the response.
            self.deadline = self.worker.clock() + LINGER_SECS
            if transport.can_write_eof():
                transport.write_eof()
        elif close:
            self.close()
        else:
            self.deadline = self.worker.clock() + KEEP_ALIVE_SECS
            if self._reading.held and not self._queue:
                self._reading.release()

    # ---- Sanic ----------------------------------------------------------------------------------

    def _pass_to_sanic(self, incoming: Incoming) -> None:
        close = (self._discarding and not self._queue) or self.worker.draining
        self._sanic_closes = close
        request = incoming.sanic_request(close=close)
        self.hand_to_sanic(request, key=incoming.key, origin=incoming.head.origin)

    def sanic_done(self) -> None:
        self._answered(close=self._sanic_closes)
        self._next()

    # ---- for the exchange and the server's sweep ------------------------------------------------

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def abort(self) -> None:
        self.exchange = None
        if self.transport is not None:
            self.transport.abort()

    def close(self, timeout: float | None = None) -> None:
        """Flush for a bounded time, then close. Sanic's own close needs its task."""
        if self.transport is not None and not self.transport.is_closing():
            self.deadline = self.worker.clock() + FLUSH_SECS
            self.transport.close()

    def close_if_idle(self) -> bool:
        if self._busy() or self._current is not None:
            return False
        if not self._began:  # a new connection, whose first request is on the way
            self.deadline = self.worker.clock() + FIRST_SECS
            return False
        self.close()
        return True

    def expire(self) -> None:
        """The deadline passed: a keep-alive is due, a request is late, the connection is idle."""
        self.deadline = 0.0
        if self.transport is None or self.transport.is_closing():
            self.abort()
        elif self.exchange is not None:
            self.exchange.send_keep_alive()
        elif self._current is not None:  # nothing is being answered: that ends the deadline
            self._reject(problems.HttpRefused(408, f"no request within {RECEIVE_SECS:.0f} seconds"))
            self._next()
        else:
            self.close()
