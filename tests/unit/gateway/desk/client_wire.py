"""A connection of a client to a desk's worker, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

from engine_wire import Wire
from gateway_desk import Desk, answers
from sanic import Sanic

from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.client.connection import (
    ClientConnection,
)
from llmux.gateway.control.app import build_app

FIXED = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BODY = b'{"model":"alpha"}'


class ClientWire(Wire):
    def __init__(self) -> None:
        super().__init__()
        self.closed = self.ended = False
        self.limits: dict[str, int] = {}
        self.aborted = False

    def abort(self) -> None:
        self.aborted = self.closing = True

    def set_write_buffer_limits(self, **limits: int) -> None:
        self.limits = limits

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = self.closing = True

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default


class Handing(ClientConnection):
    """``handed``: what Sanic would get, which is not there; ``sanic_done`` is its answer's end."""

    __slots__ = ("handed",)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.handed: list[tuple[bytes, KeyUse | None, bytes]] = []

    def hand_to_sanic(self, request: bytes, *, key: KeyUse | None, origin: bytes) -> None:
        self.sanic_busy = True
        self.handed.append((request, key, origin))

    def sanic_done(self) -> None:
        self.sanic_busy = False
        super().sanic_done()


class Door:
    """A connection to a desk's worker."""

    def __init__(self, desk: Desk, kind: type[ClientConnection] = ClientConnection) -> None:
        app = build_app(desk.config, desk.dispatch, desk.page)
        Sanic.unregister_app(app)
        self.desk = desk
        self.wire = ClientWire()
        self.connection = kind(loop=asyncio.get_running_loop(), app=app, connections=set())
        self.connection.connection_made(self.wire)

    def send(self, data: bytes, size: int = 1 << 20) -> None:
        for at in range(0, len(data), size):
            self.connection.data_received(data[at : at + size])

    @property
    def got(self) -> bytes:
        return b"".join(self.wire.written)

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0: there is none."""
        deadline = self.connection.deadline
        return deadline - self.desk.now if deadline else 0.0

    def statuses(self) -> list[int]:
        parts = self.got.split(b"HTTP/1.1 ")
        return [int(part[:3]) for part in parts[1:]]

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def answer(self) -> None:
        """As the engine, to the request under way."""
        exchange = self.connection.exchange
        assert exchange is not None
        answers(exchange, FIXED)
        exchange.connection = None
        exchange.response_end()


def a_request(
    body: bytes = BODY, *headers: bytes, path: bytes = b"/v1/completions", method: bytes = b"POST"
) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: x", *headers]
    if not any(line.lower().startswith(b"transfer-encoding") for line in headers):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", b""]) + body
