"""The client's side: one HTTP/1.x connection. Takes inference requests, hands the rest to Sanic.

Sanic alone spends 79 µs on a small POST (2 cores, Python 3.11, uvloop), 12,700/s per core; the goal
for a whole relayed request is 15,000/s. So this subclass of Sanic's protocol takes the inference
routes itself without a task or a coroutine, and hands every other request to Sanic, one at a time
and in one canonical form: no two parsers can disagree about where a request ends.

Requests of one connection are answered in order, one at a time; pipelined ones wait in ``_queue``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import httptools
from sanic.models.server_types import ConnInfo
from sanic.server.protocols.http_protocol import HttpProtocol

from llmux.errors import Refused
from llmux.gateway import openai, openapi, problems
from llmux.gateway.cors import options_response
from llmux.gateway.entry import let_in
from llmux.gateway.heads import BadHead
from llmux.gateway.incoming import Incoming, new_request_id, plain_head
from llmux.gateway.relay import Exchange
from llmux.gateway.request_head import Headers, HeadReader
from llmux.gateway.routes import Source

if TYPE_CHECKING:
    from llmux.gateway.gateway import Gateway

MAX_HEAD = 16_000  # below Sanic's ceiling of 16384, which sees the head again for its own routes
MAX_QUEUED = 16  # pipelined requests held before the connection is no longer read …
MAX_QUEUED_BYTES = 1024 * 1024  # … and the bytes of their bodies
RECEIVE_SECS = 60.0  # for a request to arrive …
RECEIVE_RATE = 4096  # … and a second more for each so many bytes of its body
KEEP_ALIVE_SECS = 120.0  # an idle connection is kept this long
FIRST_SECS = 1.0  # a stop gives those who just came so long to send a request
FLUSH_SECS = 30.0  # a closed connection's last bytes, to a client that reads slowly
LINGER_SECS = 2.0  # after an early refusal: time for the client to read it before the reset


class FrontProtocol(HttpProtocol):
    """``exchange``: the inference request being answered; ``_sanic_busy``: Sanic answers one."""

    __slots__ = (
        "_advancing", "_at_once", "_began", "_body", "_current", "_deaf", "_fed", "_head_bytes",
        "_headers", "_parser", "_queue", "_reader", "_sanic_busy", "_size", "_url", "deadline",
        "exchange", "gateway", "writing_paused",
    )  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gateway: Gateway = self.app.ctx.gateway
        self.exchange: Exchange | None = None
        self.writing_paused = False
        self.deadline = 0.0  # by the gateway's clock; 0 = none; the gateway's sweep looks at it
        self._parser: Any = httptools.HttpRequestParser(self)
        self._reader = HeadReader()
        self._queue: deque[Incoming] = deque()
        self._current: Incoming | None = None  # being received
        self._headers: Headers | None = None  # of it, until all are there
        self._head_bytes = 0
        self._at_once = False  # it came in one piece that is no larger than a head may be
        self._fed = 0  # the size of the piece that is being read
        self._url = b""
        self._body: list[bytes] = []
        self._size = 0
        self._began = 0.0  # when the first byte of what is being received came
        self._deaf = False  # what still arrives is thrown away
        self._sanic_busy = False
        self._advancing = False

    # ---- asyncio's callbacks --------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        # Unlike Sanic's: no task and no request buffer before Sanic is needed on this connection.
        transport.set_write_buffer_limits(low=16384, high=65536)
        self.transport = transport
        self.connections.add(self)
        self.gateway.clients += 1
        late = self.gateway.draining  # a TLS handshake may end after the stop began
        self.deadline = self.gateway.clock() + (FIRST_SECS if late else KEEP_ALIVE_SECS)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        head = self._headers
        self._fed = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as wish:
            self._read_plainly(memoryview(data)[wish.args[0] :])
        except httptools.HttpParserError as error:
            self._reject(problems.HttpRefused(400, f"cannot read the request: {error}"))
        if self._headers is not None:  # a head goes on
            self._at_once = False
            if self._headers is head:  # all of the data belong to it
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD:
                    self._reject_head()
        if self._current is not None and self.exchange is None and not self._sanic_busy:
            self.deadline = self._began + RECEIVE_SECS + self._size / RECEIVE_RATE
        if self._queue:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self.gateway.clients -= 1
        self.gateway.client_left.set()
        self.deadline = 0.0
        self._parser = None  # parser and protocol refer to each other
        self._queue.clear()
        self._current = None
        self._body = []
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()
        if self.conn_info is not None:
            self.conn_info.lost = True
        self._can_write.set()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[no-untyped-call]  # Sanic's
        self.writing_paused = True
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[no-untyped-call]  # Sanic's
        self.writing_paused = False
        if self.exchange is not None:
            self.exchange.resume()

    # ---- httptools' callbacks: one request being received ---------------------------------------

    def on_message_begin(self) -> None:
        if self._deaf:
            return
        self._current = Incoming()
        self._headers = self._current.headers
        self._began = self.gateway.clock()
        self._size = 0
        self._head_bytes = 0
        self._at_once = self._fed <= MAX_HEAD
        self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._headers is not None:  # else a trailer: dropped
            self._headers.append((name, value))

    def _reject_head(self) -> None:
        self._reject(problems.HttpRefused(431, f"the request head is larger than {MAX_HEAD} bytes"))

    def on_headers_complete(self) -> None:
        incoming = self._current
        parser = self._parser
        if incoming is not None and parser.should_upgrade() and parser.get_method() != b"CONNECT":
            return  # to be read again
        self._headers = None
        if incoming is None:
            return
        incoming.target = self._url
        if not self._at_once and incoming.head_bytes() > MAX_HEAD:
            self._reject_head()
            return
        incoming.keep_alive = parser.should_keep_alive()
        incoming.method = parser.get_method()
        self._body = []
        self._size = 0
        try:
            incoming.read_head(parser.get_http_version(), self._reader)
        except BadHead as wrong:
            self._reject(problems.HttpRefused(400, str(wrong)))
            return
        incoming.find_route()
        try:
            let_in(incoming, self.gateway.guard, self.transport)
            if incoming.match is not None and incoming.match.route.source is Source.FORM:
                incoming.begin_upload()
        except Refused as problem:
            self._reject(problem)
            return
        if incoming.length > self.gateway.max_body_bytes:
            self._reject(problems.too_large(self.gateway.max_body_bytes))
        elif incoming.head.expects_continue and not self._busy():
            # A busy connection gets no 100: it would land inside the answer before it. The client
            # then sends the body on its own after a while, as RFC 9110 10.1.1 tells it to.
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if self._current is None:
            return
        self._size += len(body)
        if self._size > self.gateway.max_body_bytes:
            self._reject(problems.too_large(self.gateway.max_body_bytes))
        elif self._current.upload is not None:
            self._upload(self._current, body)
        else:
            self._body.append(body)

    def _upload(self, incoming: Incoming, data: bytes) -> None:
        try:
            model = incoming.add_upload(data)
            if model and self.gateway.find_model(model) is None:
                raise openai.unknown_model(model)  # before all of it has been sent
        except Refused as problem:
            self._reject(problem)

    def on_message_complete(self) -> None:
        if self._current is None or self._headers is not None:  # the latter: to be read again
            return
        incoming, self._current = self._current, None
        body, self._body = self._body, []
        incoming.body = body[0] if len(body) == 1 else b"".join(body)
        self._queue.append(incoming)

    def _read_plainly(self, rest: memoryview) -> None:
        """A wish for another protocol may be ignored (RFC 9110 7.8), but the parser takes the body
        for that protocol's: a new one reads it all, without the wish."""
        while self._headers is not None:
            plain = plain_head(self._parser, self._url, self._headers)
            self._parser = httptools.HttpRequestParser(self)
            try:
                self._parser.feed_data(plain)
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as wish:
                rest = rest[wish.args[0] :]
            except httptools.HttpParserError as error:
                self._reject(problems.HttpRefused(400, f"cannot read the request: {error}"))
                return
        if self._queue:  # CONNECT: what follows is unclear
            self._queue[-1].keep_alive = False
        self._stop_receiving()

    # ---- what cannot be received ----------------------------------------------------------------

    def _reject(self, problem: Refused) -> None:
        """Answer what is being received with an error, after those before it, and read no more."""
        if self._deaf:
            return
        incoming = self._current or Incoming()
        incoming.problem = problem
        incoming.keep_alive = False
        incoming.request_id = incoming.request_id or new_request_id()
        self._queue.append(incoming)
        self._stop_receiving()

    def _stop_receiving(self) -> None:
        self._deaf = True
        self._current = self._headers = None
        self._body = []

    def read_no_further(self) -> None:
        """What was read is answered, and what was not goes: the client may send it again."""
        self._stop_receiving()
        if self.transport is not None:
            self.transport.resume_reading()

    # ---- one after the other --------------------------------------------------------------------

    def _busy(self) -> bool:
        return self.exchange is not None or self._sanic_busy or bool(self._queue)

    def _next(self) -> None:
        if self._advancing:
            return  # an answer given at once comes back here; a loop instead of recursion
        self._advancing = True
        while self._queue and self.exchange is None and not self._sanic_busy:
            if self.transport is None or self.transport.is_closing():
                break
            self._start(self._queue.popleft())
        self._advancing = False
        if self._queue and not self._deaf and self.transport and not self.transport.is_closing():
            size = sum(len(incoming.body) for incoming in self._queue)
            if len(self._queue) > MAX_QUEUED or size > MAX_QUEUED_BYTES:
                self.transport.pause_reading()

    def _start(self, incoming: Incoming) -> None:
        self.deadline = 0.0
        if incoming.problem is not None:
            self._answer_problem(incoming, incoming.problem)
        elif incoming.match is not None:
            try:
                self.exchange = self.gateway.exchange(self, incoming, incoming.match)
            except Refused as problem:
                self._answer_problem(incoming, problem)
                return
            self.gateway.submit(self.exchange)
        elif incoming.method == b"OPTIONS" and (methods := openapi.methods_of(incoming.path)):
            close = not incoming.keep_alive or self.gateway.draining
            self.write(options_response(incoming, methods, self.gateway.cors, close=close))
            self._answered(close=close)
        elif not incoming.target_is_readable():
            self._answer_problem(incoming, problems.HttpRefused(400, "cannot read the target"))
        else:
            self._hand_to_sanic(incoming)

    def _answer_problem(self, incoming: Incoming, problem: Refused) -> None:
        self.gateway.observer.answered("", problems.status_of(problem))
        self.gateway.log.refused(problem, request=incoming.request_id)
        close = not incoming.keep_alive or self.gateway.draining
        self.write(incoming.refusal(problem, self.gateway.cors, close=close))
        self._answered(close=close)

    def exchange_done(self, *, close: bool) -> None:
        """The exchange's answer is written; called by it exactly once, unless it aborted."""
        self.exchange = None
        self._answered(close=close)
        if self._queue:
            self._next()

    def _answered(self, *, close: bool) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        close = close or self.gateway.draining
        if close and (self._queue or self._current is not None):  # what was pipelined: no answer
            self._queue.clear()
            self._stop_receiving()
            transport.resume_reading()
        if self._deaf and not self._queue:
            # Closing with bytes unread makes the kernel send a reset that can overtake the answer.
            self.deadline = self.gateway.clock() + LINGER_SECS
            if transport.can_write_eof():
                transport.write_eof()
        elif close:
            self.close()
        else:
            self.deadline = self.gateway.clock() + KEEP_ALIVE_SECS
            if not self._queue:
                transport.resume_reading()

    # ---- Sanic ----------------------------------------------------------------------------------

    def _hand_to_sanic(self, incoming: Incoming) -> None:
        self._sanic_busy = True
        close = (self._deaf and not self._queue) or self.gateway.draining
        if self.conn_info is None:
            self.conn_info = ConnInfo(self.transport, unix=self._unix)  # type: ignore[arg-type]  # a Transport is what it reads
        self.conn_info.ctx.key = incoming.key
        self.conn_info.ctx.origin = incoming.head.origin
        if self._task is None:
            self.recv_buffer = bytearray(incoming.sanic_request(close=close))
            task = self.connection_task()  # type: ignore[no-untyped-call]  # Sanic's
            self._task = self.loop.create_task(task)
        else:
            self.recv_buffer += incoming.sanic_request(close=close)
            self._data_received.set()

    async def receive_more(self) -> None:
        """Sanic asks for more only when it is done: it always gets whole requests."""
        self._data_received.clear()
        self.loop.call_soon(self._sanic_done)
        await self._data_received.wait()

    def _sanic_done(self) -> None:
        if self._sanic_busy:
            self._sanic_busy = False
            self._answered(close=False)
            self._next()

    def check_timeouts(self) -> None:
        """Sanic's own would cancel its task, and with it this connection, while we stream."""

    # ---- for the exchange and the gateway's sweep -----------------------------------------------

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def abort(self) -> None:
        self.exchange = None
        if self.transport is not None:
            self.transport.abort()

    def close(self, timeout: float | None = None) -> None:
        """What is written still goes out, for a bounded time. Sanic's own close wants its task."""
        if self.transport is not None and not self.transport.is_closing():
            self.deadline = self.gateway.clock() + FLUSH_SECS
            self.transport.close()

    def close_if_idle(self) -> bool:
        if self._busy() or self._current is not None:
            return False
        if not self._began:  # it has just come; its first request is on the way
            self.deadline = self.gateway.clock() + FIRST_SECS
            return False
        self.close()
        return True

    def expire(self) -> None:
        """The deadline passed: idle for too long, or a request that does not arrive."""
        self.deadline = 0.0
        if self.transport is None or self.transport.is_closing():
            self.abort()
        elif self.exchange is not None:
            self.exchange.still_waiting()
        elif self._current is not None and not self._busy():
            self._reject(problems.HttpRefused(408, f"no request within {RECEIVE_SECS:.0f} seconds"))
            self._next()
        else:
            self.close()
