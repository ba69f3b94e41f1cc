"""Send one HTTP request to an engine, over its unix socket or 127.0.0.1; read the whole answer.

One connection per request and ``Connection: close``: none may be open while CRIU dumps the engine.
HTTP is parsed by httptools, which Sanic brings along; there is no HTTP client library. Never
retries, never judges a status, has no deadline of its own: see ``vllm``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import httptools

from llmux import typed_json
from llmux.printable import printable
from llmux.protocol import Address

# An openapi.json has about 0.3 MB. Parsed, an odd one takes some 25 times its size.
BODY_CAP: Final = 2 * 1024 * 1024
EXCERPT: Final = 500  # characters of an error body that go into a message


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes

    def json(self) -> Any:
        """Raises BadJson, a ValueError."""
        return typed_json.parse(self.body)

    @property
    def excerpt(self) -> str:
        text = printable(" ".join(self.body.decode(errors="replace").split()))
        return text[:EXCERPT] + ("…" if len(text) > EXCERPT else "")


class Unreachable(Exception):
    """There was no complete answer: refused, reset, no such socket, or not HTTP."""


class _TooLong(Exception):
    pass


class _Response:
    """httptools' callbacks. Old versions (0.1.1) call some of them without checking for them."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.headed = False  # its head is complete
        self.complete = False
        self.framed = False  # a length or chunks say where the body ends; else the connection does

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self.framed = True

    def on_headers_complete(self) -> None:
        self.headed = True

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > BODY_CAP:
            raise _TooLong

    def on_message_complete(self) -> None:
        self.complete = True


@asynccontextmanager
async def _connection(
    address: Address,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    if address.uds is not None:
        reader, writer = await asyncio.open_unix_connection(address.uds)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    try:
        yield reader, writer
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        # Closed before returning: a dump may come next.
        with suppress(OSError):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()


async def exchange(
    address: Address,
    method: str,
    target: str,
    body: bytes = b"",
    content_type: str = "application/json",
) -> Reply:
    """Send one request and return its answer. Raises Unreachable."""
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: */*\r\n"
    if method != "GET":
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    try:
        async with _connection(address) as (reader, writer):
            writer.write(head.encode() + b"\r\n" + body)
            while not response.complete:
                data = await reader.read(65536)
                if not data:
                    break
                parser.feed_data(data)
            status = parser.get_status_code()
    except (OSError, httptools.HttpParserError, ValueError) as error:
        if isinstance(error.__context__, _TooLong):  # in the parser's callback
            raise Unreachable(f"the answer is longer than {BODY_CAP} bytes") from error
        raise Unreachable(str(error) or type(error).__name__) from error
    if not response.complete and (response.framed or not response.headed):
        raise Unreachable("the connection was closed in the middle of the answer")
    return Reply(status, bytes(response.body))
