#!/usr/bin/env python3
"""An engine whose control routes answer as vLLM's do, or in any other way.

``odd_engine.py serve MODEL --uds PATH``. $ODD_ORDERS names a file whose number is the share of odd
answers; it is read at each request. Each odd answer is a line "ROUTE KIND" in $ODD_LOG. Half of the
starts have one route that is always odd, so that each step meets an engine that was right so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

ROUTES = (
    "/health", "/version", "/v1/models", "/openapi.json", "/v1/completions", "/is_sleeping",
    "/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/metrics",
)  # fmt: skip
CHAT = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}]}
COMPLETION = {"choices": [{"text": "Paris", "logprobs": {"token_logprobs": [-0.5]}}]}
METRICS = b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"
DEEP = b"[" * 200_000
BODIES = (
    DEEP, b"", b"\xff\xfe", b"null", b"true", b"7", b'"text"', b"[]", b"{}", b"NaN", b"\0" * 1000,
    b'{"data": [{"max_model_len": Infinity}]}', b'{"data": [{"max_model_len": 1e999}]}',
    b'{"data": [{"max_model_len": ' + b"9" * 5000 + b"}]}", b'{"data": {"a": 1}}',
    b'{"version": "' + b"9" * 5000 + b'"}', b'{"version": {"a": []}}',
    b'{"version": "\\u001b]0;x\\u0007' + b"1" * (2 << 20) + b'"}',
    b'{"choices": [{"text": "x", "logprobs": {"token_logprobs": [1' + b"0" * 400 + b"]}}]}",
    b'{"choices": [{"text": "x", "logprobs": {"token_logprobs": [NaN]}}]}',
    b'{"choices": [{"text": "x", "logprobs": {"token_logprobs": {"a": null}}}]}',
    b'{"choices": [{"text": ["x"], "logprobs": [1]}]}', b'{"choices": {}}', b'{"choices": [null]}',
    b'{"is_sleeping": ' + DEEP, b'{"is_sleeping": "no"}', b'{"is_sleeping": []}',
    b'{"paths": 7}', b'{"paths": {"/sleep": null}}', b'{"paths": [["a"], {"b": 1}]}',
    b"vllm:num_requests_running NaN\nvllm:num_requests_running{ 1 2\n",
    b"vllm:num_requests_running 1e999\nvllm:generation_tokens_total -5\n" * 1000,
)  # fmt: skip
STATUSES = (200, 200, 200, 201, 204, 206, 301, 400, 401, 404, 405, 418, 429, 500, 503, 599)

Write = Callable[[bytes], Awaitable[None]]


def _note(line: str) -> None:
    with open(os.environ["ODD_LOG"], "a") as log:
        log.write(line)


class Engine:
    def __init__(self, model: str) -> None:
        self.model = model
        self.asleep = False
        self._random = random.Random()
        self._odd_route = self._random.choice(ROUTES) if self._random.random() < 0.5 else ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            line, *headers = head.decode("latin-1").split("\r\n")
            length = [h.partition(":")[2] for h in headers if h.lower().startswith("content-l")]
            await reader.readexactly(int(length[0]) if length else 0)
            await self._answer(line.split()[1].partition("?")[0], writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the caller gave up
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        if path in ROUTES and self._is_odd(path):
            kind = self._random.choice(sorted(KINDS))
            _note(f"{path} {kind}\n")
            if self._random.random() < 0.5:  # it may have obeyed nevertheless
                self._obey(path)
            await KINDS[kind](self, write, writer)
            return
        self._obey(path)
        body = self._right(path)
        length = b"Content-Length: %d\r\n" % len(body)
        await write(self._head(b"Content-Type: application/json\r\n" + length) + body)

    def _is_odd(self, path: str) -> bool:
        share = 0.0
        with contextlib.suppress(OSError, ValueError):
            share = float(Path(os.environ["ODD_ORDERS"]).read_text())
        return share > 0 and (path == self._odd_route or self._random.random() < share)

    def _obey(self, path: str) -> None:
        self.asleep = {"/sleep": True, "/wake_up": False}.get(path, self.asleep)

    def _right(self, path: str) -> bytes:
        if path == "/metrics":
            return METRICS
        answers: dict[str, object] = {
            "/version": {"version": "0.20.2"},
            "/v1/models": {"data": [{"id": self.model, "max_model_len": 4096}]},
            "/openapi.json": {"paths": {route: {} for route in ROUTES}},
            "/v1/completions": COMPLETION,
            "/v1/chat/completions": CHAT,
            "/is_sleeping": {"is_sleeping": self.asleep},
        }
        return json.dumps(answers.get(path, {})).encode()

    # ---- odd answers ----------------------------------------------------------------------------

    def _body(self) -> bytes:
        return self._random.choice(BODIES)

    def _head(self, more: bytes, status: int = 200) -> bytes:
        return b"HTTP/1.1 %d X\r\n%b\r\n" % (status, more)

    async def body(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        body = self._body()
        await write(self._head(b"Content-Length: %d\r\n" % len(body)) + body)

    async def status(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        body, status = self._body(), self._random.choice(STATUSES)
        await write(self._head(b"Content-Length: %d\r\n" % len(body), status) + body)

    async def chunked(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        body = self._body()
        end = self._random.choice((b"0\r\n\r\n", b"", b"zz\r\n", b"-1\r\n\r\n", b"0\r\n"))
        head = self._head(b"Transfer-Encoding: chunked\r\n")
        await write(head + b"%x\r\n%b\r\n%b" % (len(body), body, end))

    async def framing(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        body = self._body()[:5000]
        lines = self._random.choice((
            b"Content-Length: %d\r\n" % (len(body) + 7), b"Content-Length: 3\r\n",
            b"Content-Length: -1\r\n", b"Content-Length: %b\r\n" % (b"9" * 40),
            b"Content-Length: 1\r\nContent-Length: 2\r\n", b"Transfer-Encoding: xchunked\r\n",
            b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"X\r\n", b"X: \0\r\n", b"",
        ))  # fmt: skip
        await write(self._head(lines) + body)

    async def start_line(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        line = self._random.choice((
            b"HTTP/1.1 abc OK", b"HTTP/9.9 200 OK", b"ICY 200 OK", b"", b"\xff" * 50,
            b"HTTP/1.1 101 Up", b"HTTP/1.1 100 Go\r\n\r\nHTTP/1.1 100 Go", b"HTTP/1.1 99999 X",
        ))  # fmt: skip
        await write(line + b"\r\nContent-Length: 2\r\n\r\n{}")

    async def no_answer(self, _write: Write, _writer: asyncio.StreamWriter) -> None:
        """Closed at once."""

    async def reset(self, write: Write, writer: asyncio.StreamWriter) -> None:
        await write(self._head(b"Content-Length: 100\r\n") + b"{")
        writer.transport.abort()

    async def silence(self, _write: Write, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(20)  # longer than any deadline of the test's

    async def drip(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        for byte in self._head(b"Content-Length: 300\r\n") + b" " * 300:
            await write(bytes([byte]))
            await asyncio.sleep(0.05)

    async def endless_body(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        await write(self._head(b""))
        for _ in range(400):  # 25 MiB, more than is read
            await write(b" " * 65536)

    async def endless_head(self, write: Write, _writer: asyncio.StreamWriter) -> None:
        await write(b"HTTP/1.1 200 OK\r\n")
        for number in range(200):
            await write(b"".join(b"X-%d-%d: y\r\n" % (number, n) for n in range(1000)))


Kind = Callable[[Engine, Write, asyncio.StreamWriter], Awaitable[None]]
KINDS: dict[str, Kind] = {
    "body": Engine.body, "status": Engine.status, "chunked": Engine.chunked,
    "framing": Engine.framing, "start line": Engine.start_line, "no answer": Engine.no_answer,
    "reset": Engine.reset, "silence": Engine.silence, "drip": Engine.drip,
    "endless body": Engine.endless_body, "endless head": Engine.endless_head,
}  # fmt: skip


async def main(arguments: list[str]) -> None:
    engine = Engine(arguments[1])
    path = arguments[arguments.index("--uds") + 1]
    server = await asyncio.start_unix_server(engine.serve, path, limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
