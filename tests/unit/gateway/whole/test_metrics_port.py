"""The port of the numbers' own: one question a connection, /metrics and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, cast

import pytest

from llmux.gateway import metrics
from llmux.gateway.metrics import MAX_HEAD, MetricsPage, serve_metrics

TEXT = "text/plain; version=1"


class Page:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def scrape(self, accept: str, timeout: str) -> tuple[bytes, str]:
        self.asked.append((accept, timeout))
        return b"a 1\n", TEXT


class Port:
    """What a test says to the port of a page, and what that answers until it closes."""

    def __init__(self) -> None:
        self.page = Page()

    async def open(self) -> None:
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.addresses = [listener.getsockname() for listener in listeners]
        self.servers = await serve_metrics(cast(MetricsPage, self.page), listeners)

    async def says(self, data: bytes, *, end: bool = False, number: int = 0) -> bytes:
        reader, writer = await asyncio.open_connection(*self.addresses[number])
        writer.write(data)
        if end:
            writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    def close(self) -> None:
        for server in self.servers:
            server.close()


def with_port(test: Any) -> Any:
    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: errors.append(context)
        )
        port = Port()
        await port.open()
        try:
            async with asyncio.timeout(60):
                await test(port)
        finally:
            port.close()
        assert errors == []

    errors: list[Any] = []
    return lambda: asyncio.run(body())


def answer(status: str, body: bytes, *more: str, kind: str = "text/plain; charset=utf-8") -> bytes:
    lines = [
        f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *more,
        "connection: close", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + body


FOUND = answer("200 OK", b"a 1\n", kind=TEXT)
NOT_FOUND = answer("404 Not Found", b"only /metrics is here\n")
NOT_ALLOWED = answer("405 Method Not Allowed", b"only GET\n", "allow: GET, HEAD")
TOO_LARGE = answer("431 Request Header Fields Too Large", b"")


@with_port
async def test_each_question_has_its_answer(port: Port) -> None:
    for asked, expected in (
        (b"GET /metrics HTTP/1.1", FOUND),
        (b"GET /metrics?x=1 HTTP/1.0", FOUND),
        (b"HEAD /metrics HTTP/1.1", FOUND.removesuffix(b"a 1\n")),
        (b"GET / HTTP/1.1", NOT_FOUND),
        (b"GET /metrics/ HTTP/1.1", NOT_FOUND),
        (b"POST /metrics HTTP/1.1", NOT_ALLOWED),
        (b"get /metrics HTTP/1.1", NOT_ALLOWED),
        (b"POST /x HTTP/1.1", NOT_FOUND),
        (b"/metrics", NOT_FOUND),
        (b"", NOT_FOUND),
    ):
        assert await port.says(asked + b"\r\nHost: x\r\n\r\n") == expected, asked
    assert len(port.page.asked) == 3
    assert await port.says(b"GET /metrics HTTP/1.1\r\n\r\n", number=1) == FOUND
    assert await port.says(2 * b"GET /metrics HTTP/1.1\r\n\r\n") == FOUND, "one and no more"


@with_port
async def test_what_prometheus_says_of_itself_is_passed_on(port: Port) -> None:
    for headers, expected in (
        ((b"Accept: text/html", b"X-Prometheus-Scrape-Timeout-Seconds: 9"), (" text/html", " 9")),
        ((b"accept:a", b"Host: x", b"ACCEPT:b"), ("a,b", "")),
        ((b"Accept-Encoding: gzip",), ("", "")),
        ((b"accept: \xe9",), (" \xe9", "")),
    ):
        head = b"\r\n".join([b"GET /metrics HTTP/1.1", *headers, b"", b""])
        assert await port.says(head) == FOUND
        assert port.page.asked.pop() == expected


@with_port
async def test_a_head_has_a_bound(port: Port) -> None:
    start, end = b"GET /metrics HTTP/1.1\r\nx: ", b"\r\n\r\n"
    fits = start + b"x" * (MAX_HEAD - len(start) - len(end)) + end
    assert await port.says(fits) == FOUND
    assert await port.says(fits.replace(b"x: ", b"x: xxxxx")) == TOO_LARGE


@with_port
async def test_one_who_ends_before_the_end_of_the_head_is_told_nothing(port: Port) -> None:
    reader, writer = await asyncio.open_connection(*port.addresses[0])
    writer.write(b"GET /metrics HTTP/1.1\r\n")
    writer.write_eof()
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    assert port.page.asked == []


def test_one_who_says_nothing_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "HEAD_SECS", 0.01)

    @with_port
    async def silent(port: Port) -> None:
        reader, writer = await asyncio.open_connection(*port.addresses[0])
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()

    silent()


def test_a_fault_of_ours_is_not_the_head_of_theirs() -> None:
    async def ask() -> bytes:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, told: faults.append(told))
        port = Port()
        await port.open()
        setattr(port.page, "scrape", fail)  # noqa: B010  # of a method
        async with asyncio.timeout(60):
            answered = await port.says(b"GET /metrics HTTP/1.1\r\n\r\n")
        port.close()
        return answered

    async def fail(_accept: str, _timeout: str) -> tuple[bytes, str]:
        raise KeyError("ours")

    faults: list[Any] = []
    assert asyncio.run(ask()) == b""
    assert [type(told["exception"]) for told in faults] == [KeyError]
