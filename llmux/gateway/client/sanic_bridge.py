"""Sanic's HTTP protocol, driven by us. The only file that names Sanic's private attributes.

Sanic gets one complete request at a time, in one canonical form, so no two parsers can disagree
about where a request ends. tests/unit/gateway/test_sanic_bridge.py checks that every attribute used
here exists in the pinned version.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

from sanic.models.server_types import ConnInfo
from sanic.server.protocols.http_protocol import HttpProtocol

from llmux.gateway.admission.key_limits import KeyUse

# Attributes of HttpProtocol that are used here and are no documented API of Sanic.
PRIVATE: Final = (
    "_can_write", "_data_received", "_task", "_unix", "app", "conn_info", "connection_task",
    "connections", "loop", "receive_more", "recv_buffer", "transport",
)  # fmt: skip
# Methods of Sanic's that this class or its subclass replaces.
REPLACED: Final = (
    "abort", "check_timeouts", "close", "close_if_idle", "connection_lost", "connection_made",
    "data_received", "pause_writing", "receive_more", "resume_writing",
)  # fmt: skip


class SanicBridge(HttpProtocol):
    """``sanic_busy``: Sanic is answering a request. The subclass receives and parses."""

    __slots__ = ("sanic_busy",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sanic_busy = False

    @abstractmethod
    def sanic_done(self) -> None:
        """Called when Sanic has written its response."""

    def connection_made(self, transport: Any) -> None:
        # Unlike Sanic's: no task and no request buffer before Sanic is needed on this connection.
        transport.set_write_buffer_limits(low=16384, high=65536)
        self.transport = transport
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        if self.conn_info is not None:
            self.conn_info.lost = True
        self._can_write.set()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[no-untyped-call]  # Sanic's

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[no-untyped-call]  # Sanic's

    def hand_to_sanic(self, request: bytes, *, key: KeyUse | None, origin: bytes) -> None:
        """``request`` is complete. ``key`` and ``origin`` are for the handlers."""
        self.sanic_busy = True
        if self.conn_info is None:
            self.conn_info = ConnInfo(self.transport, unix=self._unix)  # type: ignore[arg-type]  # a Transport is what it reads
        self.conn_info.ctx.key = key
        self.conn_info.ctx.origin = origin
        if self._task is None:
            self.recv_buffer = bytearray(request)
            task = self.connection_task()  # type: ignore[no-untyped-call]  # Sanic's
            self._task = self.loop.create_task(task)
        else:
            self.recv_buffer += request
            self._data_received.set()

    async def receive_more(self) -> None:
        """Sanic asks for more only when it is done: it always gets complete requests."""
        self._data_received.clear()
        self.loop.call_soon(self._after_response)
        await self._data_received.wait()

    def _after_response(self) -> None:
        if self.sanic_busy:
            self.sanic_busy = False
            self.sanic_done()

    def check_timeouts(self) -> None:
        """Disabled: Sanic would cancel its task, and with it this connection, while we stream."""


def request_key(request: Any) -> KeyUse | None:
    """The key that the request was authorized with."""
    key: KeyUse | None = request.conn_info.ctx.key if request.conn_info else None
    return key


def caller_of(request: Any) -> str:
    """Who gives an order over HTTP, for the journal and the events."""
    use = request_key(request)
    return "a local client of the API" if use is None else f"key {use.key.name}"


def request_origin(request: Any) -> bytes:
    return bytes(request.conn_info.ctx.origin) if request.conn_info else b""
