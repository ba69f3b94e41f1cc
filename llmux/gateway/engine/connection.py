"""One keep-alive connection to an engine.

asyncio transports and httptools; the parser only finds where a response begins and ends, the bytes
themselves are passed on unchanged.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from dataclasses import dataclass
from typing import Any, Protocol

import httptools

from llmux.errors import Reason
from llmux.gateway.engine.answer_head import AnswerHead, read_answer_head
from llmux.gateway.engine.request import EngineRequest
from llmux.gateway.http.heads import BadHead
from llmux.gateway.http.multipart import Upload

MAX_HEAD = 64 * 1024  # h11's and uvicorn's own bound for a head
MAX_INTERIM = 16  # answers of 1xx before the one
COPY_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """Why a response did not complete.

    ``connected``: the engine accepted the connection. ``between_chunks``: the bytes passed on end
    at a chunk's border, so another chunk can follow. ``malformed``: it answered, but not in HTTP;
    so it lives, and would answer the same again.
    """

    error: str
    connected: bool = True
    between_chunks: bool = False
    malformed: bool = False

    @property
    def reason(self) -> Reason:
        if self.malformed:
            return Reason.MALFORMED_ANSWER
        return Reason.ENGINE_DIED if self.connected else Reason.ENGINE_UNREACHABLE


class Sink(Protocol):
    """The receiver of one response. Ends with ``response_end`` or ``response_failed``, unless it
    aborts ``connection`` itself."""

    connection: EngineConnection | None

    def wants_connection(self) -> bool: ...
    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None: ...
    def response_bytes(self, data: bytes) -> None: ...
    def response_end(self) -> None: ...
    def response_failed(self, failure: EngineFailure) -> None: ...


class Owner(Protocol):
    """The pool that a connection belongs to."""

    def made(self, connection: EngineConnection) -> None: ...
    def release(self, connection: EngineConnection, reusable: bool) -> None: ...
    def lost(self, connection: EngineConnection) -> None: ...
    def send_fresh(self, request: EngineRequest, sink: Sink, *, lost: bool = False) -> None: ...


class EngineConnection(asyncio.Protocol):
    """One connection, one request at a time. ``sink`` is None while it is idle in the pool.

    httptools looks up ``on_*`` when the parser is made: there is no on_body and no on_header here
    on purpose, so the parser walks over those bytes in C without handing each piece to Python.
    """

    __slots__ = (
        "_between", "_broken", "_chunks", "_complete", "_full", "_head", "_head_done", "_interim",
        "_keep_alive", "_parser", "_pieces", "_request", "_sent", "_upload", "paused", "pool",
        "served", "sink", "transport", "until_close",
    )  # fmt: skip
    # Of one response, from ``send`` on:
    _head: bytes
    _head_done: bool  # the parser saw the end of the head
    _interim: int  # answers of 1xx so far
    _complete: bool
    _between: bool
    until_close: bool
    # … and from its head on:
    _keep_alive: bool
    _chunks: bool  # the engine's are passed on

    def __init__(self, pool: Owner) -> None:
        self.pool = pool
        self.transport: Any = None
        self.sink: Sink | None = None
        self.served = 0
        self._parser: Any = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] | None = None  # collected by the subclass that unchunks
        self._full = False  # the engine's receive buffer is full
        self.paused = False  # we read nothing: the client's is
        self._request: EngineRequest | None = None  # until a byte of its response was received
        self._upload: Upload | None = None  # its rest from ``_sent`` on is still to be sent
        self._sent = 0
        self._broken: str | None = None

    def send(self, request: EngineRequest, sink: Sink) -> None:
        """Called on a new connection, and on one whose last response was complete."""
        self.sink = sink
        sink.connection = self
        self._head = b""
        self._interim = 0
        self._head_done = self._complete = self.until_close = False
        self._between = True
        self._request = request
        head, body = request.head, request.body
        if not isinstance(body, bytes):
            self._upload, self._sent = body, 0
            self.transport.write(head)
            self._send_upload()
            return
        # Every write() is a system call at once (uvloop >= 0.18): copying a small body is cheaper.
        if len(body) <= COPY_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def _send_upload(self) -> None:
        """Send until the engine's buffer is full; ``resume_writing`` continues."""
        while self._upload is not None and not self._full:
            data = self._upload.read(self._sent, COPY_BYTES)
            if data:
                self._sent += len(data)
                self.transport.write(data)
            else:
                self._upload = None

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send_upload()

    def abort(self) -> None:
        """Close at once, without another call of the sink. vLLM then aborts the request."""
        self.sink = self._upload = self._request = None
        if self.transport is not None:
            self.transport.abort()

    @property
    def between_chunks(self) -> bool:
        return self._between

    @property
    def unread(self) -> bool:
        """Whether the engine has yet to read of the request; vLLM begins none before it has all.
        Seen on unix sockets only: a process that is stopped has its kernel acknowledge TCP's."""
        if self._request is None:
            return False
        if self._upload is not None or self.transport.get_write_buffer_size():
            return True
        link = self.transport.get_extra_info("socket")
        if link.family != socket.AF_UNIX:
            return False
        unread = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ
        return int.from_bytes(unread, sys.byteorder) > 0

    def pause(self) -> None:
        if not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused and not self.transport.is_closing():
            self.paused = False
            self.transport.resume_reading()

    # ---- asyncio's callbacks --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.pool.made(self)

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:
            self.abort()  # bytes without a request: the connection is out of step
            return
        try:
            if not self._head_done:
                self._feed_head(data)
                return
            self._parser.feed_data(data)
        except (httptools.HttpParserError, BadHead) as error:
            self._fail(f"the engine's answer is not HTTP: {error}")
            return
        except httptools.HttpParserUpgrade:
            self._fail("the engine's answer is not HTTP: it switches protocols")
            return
        if self._chunks and data[-1] != 0x0A:
            self._between = False  # in a chunk, or in its size, of which the parser says nothing
        if self._broken is None:
            sink.response_bytes(self._passed(data) if self._pieces is not None else data)
        if self._complete or self._broken:
            self._after_bytes(sink)

    def connection_lost(self, exc: Exception | None) -> None:
        sink, self.sink = self.sink, None
        request, self._request = self._request, None
        self._upload = None
        self._parser = None  # the parser and this object refer to each other
        self.pool.lost(self)
        if sink is None:
            return
        sink.connection = None
        if self.until_close and exc is None:
            self._complete = True  # so nothing is held back any more
            if self._pieces is not None and (rest := self._passed(b"")):
                sink.response_bytes(rest)
            sink.response_end()
        elif self.served and request is not None and sink.wants_connection():
            # The engine closed an idle connection just as we used it: no response was begun, and a
            # fresh connection shows whether the engine is there.
            self.pool.send_fresh(request, sink, lost=True)
        else:
            cause = f": {exc}" if exc else ""
            sink.response_failed(
                EngineFailure(f"the engine closed the connection{cause}", True, self._between)
            )

    # ---- the response ---------------------------------------------------------------------------

    def _feed_head(self, data: bytes) -> None:
        self._request = None
        if self._head:
            data = self._head + data
        while (end := data.find(b"\r\n\r\n") + 4) >= 4 and data[9:10] == b"1":
            # 100 Continue, 103 Early Hints: not the response
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise BadHead(f"more than {MAX_INTERIM} interim responses")
            self._parser.feed_data(data[:end])
            self._head_done = self._complete = False
            data = data[end:]
        if end < 4:
            if len(data) > MAX_HEAD:
                self._fail(f"the engine's answer has a head of more than {MAX_HEAD} bytes")
            self._head = data
            return
        self._head = b""
        rest = data[end:]
        sink = self.sink
        assert sink is not None, "data_received checked it"
        self._parser.feed_data(data)
        read, length = read_answer_head(data[:end], self._parser.get_status_code())
        self.until_close = not (length or read.chunked or self._complete)
        self._chunks = read.chunked and self._pieces is None
        if self._chunks and data[-1] != 0x0A:
            self._between = False
        if self._broken is None:
            sink.response_head(read, length, rest if self._pieces is None else self._passed(rest))
        self._after_bytes(sink)

    def _passed(self, data: bytes) -> bytes:
        """The bytes for the sink, of these bytes of the body."""
        assert self._pieces is not None, "called where pieces are collected"
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    def _after_bytes(self, sink: Sink) -> None:
        if self._broken is not None:
            self._fail(self._broken)
        elif self._complete and self.sink is sink:  # else the client disconnected meanwhile
            self.sink = sink.connection = None
            self.served += 1
            unsent = self._upload is not None or self.transport.get_write_buffer_size()
            reusable = self._keep_alive and not unsent
            self.pool.release(self, reusable)
            sink.response_end()

    def _fail(self, error: str) -> None:
        """The answer is malformed, and what follows on this connection has no meaning."""
        sink = self.sink
        self.abort()
        if sink is not None:
            sink.connection = None
            sink.response_failed(EngineFailure(error, True, self._between, malformed=True))

    # ---- httptools' callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._broken = "the engine sent more than one answer"

    def on_headers_complete(self) -> None:
        self._head_done = True
        # Read now: after the message's end llhttp has forgotten the connection header.
        self._keep_alive = self._parser.should_keep_alive()

    def on_chunk_header(self) -> None:
        self._between = False

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_message_complete(self) -> None:
        self._complete = True
