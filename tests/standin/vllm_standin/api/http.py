"""As much of HTTP/1.1 as uvicorn shows: keep-alive, chunked both ways, a client that goes away.

One request at a time per connection; what a client pipelines waits in the buffer. The task that
answers a request is cancelled when the connection is lost, which is how a generation ends whose
client is gone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, unquote

_MAX_HEAD_BYTES = 1 << 16
_MAX_BODY_BYTES = 1 << 26


class BadRequestError(Exception):
    """Not HTTP as we understand it: answered with 400, and the connection closed."""


class HttpError(Exception):
    """An answer in vLLM's error shape."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, kind, param)


def error_body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Request:
    """A request, read to its end."""

    def __init__(self, method: str, target: str, version: str, headers: dict[str, str]) -> None:
        path, _, query = target.partition("?")
        self.method = method
        self.path = unquote(path)
        self.query = parse_qs(query, keep_blank_values=True)
        self.headers = headers
        self.http10 = version == "HTTP/1.0"
        self.body = b""
        connection = headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (
            not self.http10 or "keep-alive" in connection
        )


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(
        self,
        answer: Callable[[Request, Connection], Awaitable[None]],
        keep_alive_secs: float,
        open_connections: set[Connection],
    ) -> None:
        self._answer = answer
        self._keep_alive_secs = keep_alive_secs
        self._open_connections = open_connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._keep_alive = True
        self._chunked = False
        self._continued = False
        self.status = 0

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open_connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_connections.discard(self)
        self._transport = None
        self._writable.set()
        self._stop_idle_timer()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._stop_idle_timer()
        self._next_request()

    # reading

    def _next_request(self) -> None:
        if self._task is not None or self._transport is None or not self._buffer:
            return
        try:
            request = self._parse()
        except (BadRequestError, ValueError):
            self._transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
                b"connection: close\r\n\r\nInvalid HTTP request received."
            )
            self._transport.close()
            return
        if request is not None:
            self._continued = False
            self._task = self._loop.create_task(self._run(request))

    def _parse(self) -> Request | None:
        """Take one whole request off the buffer; None: more is to come."""
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise BadRequestError
            return None
        first, *lines = self._buffer[:head_end].decode("latin-1").split("\r\n")
        method, target, version = first.split(" ")
        if not version.startswith("HTTP/1."):
            raise BadRequestError
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise BadRequestError
            headers[name.strip().lower()] = value.strip()
        request = Request(method, target, version, headers)
        start = head_end + 4
        if headers.get("transfer-encoding", "").lower() == "chunked":
            end = self._parse_chunks(request, start)
        else:
            length = int(headers.get("content-length", "0"))
            if length < 0 or length > _MAX_BODY_BYTES:
                raise BadRequestError
            end = start + length if len(self._buffer) >= start + length else None
            request.body = bytes(self._buffer[start:end])
        if end is None:
            if headers.get("expect", "").lower() == "100-continue" and not self._continued:
                self._continued = True
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        del self._buffer[:end]
        return request

    def _parse_chunks(self, request: Request, at: int) -> int | None:
        """Where the chunked body that begins at `at` ends; None: not all of it is here."""
        body = bytearray()
        while True:
            line_end = self._buffer.find(b"\r\n", at)
            if line_end < 0:
                return None
            size = int(self._buffer[at:line_end].partition(b";")[0], 16)
            data = line_end + 2
            if len(body) + size > _MAX_BODY_BYTES:
                raise BadRequestError
            if len(self._buffer) < data + size + 2:
                return None
            if size == 0:
                # trailers, if any, end with an empty line too
                end = self._buffer.find(b"\r\n\r\n", line_end)
                request.body = bytes(body)
                return end + 4 if end >= 0 else None
            body += self._buffer[data : data + size]
            at = data + size + 2

    async def _run(self, request: Request) -> None:
        self._keep_alive = request.keep_alive
        self._chunked = not request.http10
        self.status = 0
        await self._answer(request, self)
        self._task = None
        if self._transport is None:
            return
        if not self._keep_alive:
            self._transport.close()
        elif self._buffer:
            self._next_request()
        else:
            self._idle_timer = self._loop.call_later(self._keep_alive_secs, self.close)

    # answering

    def respond_json(self, status: int, content: Any) -> None:
        body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        self.respond(status, body, "application/json")

    def respond(self, status: int, body: bytes = b"", content_type: str | None = None) -> None:
        headers = [f"content-length: {len(body)}"]
        if content_type is not None:
            headers.append(f"content-type: {content_type}")
        self._write(self._head(status, headers) + body)

    def begin_stream(self, content_type: str) -> None:
        headers = [f"content-type: {content_type}"]
        if self._chunked:
            headers.append("transfer-encoding: chunked")
        else:
            self._keep_alive = False  # HTTP/1.0: the end of the connection is the end of the body
        self._write(self._head(200, headers))

    async def stream(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._write(data)
        await self._writable.wait()

    def end_stream(self) -> None:
        if self._chunked:
            self._write(b"0\r\n\r\n")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End it now, whatever has not been sent."""
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """Close once the answer under way has been given: the server is about to end."""
        self._keep_alive = False
        if self._task is None:
            self.close()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What answers the request under way."""
        return self._task

    def _head(self, status: int, headers: list[str]) -> bytes:
        self.status = status
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            time.strftime("date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "server: uvicorn",
            *headers,
        ]
        if not self._keep_alive:
            lines.append("connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
