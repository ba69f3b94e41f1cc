"""A connection to an engine without a socket: its transport, its sink, its pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmux.gateway.engine.answer_head import AnswerHead
from llmux.gateway.engine.connection import EngineConnection, EngineFailure
from llmux.gateway.engine.request import EngineRequest

ASKED = EngineRequest(b"POST /x HTTP/1.1\r\n\r\n", b"{}")
SHORT = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n2\r\n!!\r\n0\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nserver: x\r\n\r\nhello"
EARLY = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
CLOSED = SHORT.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = self.reading_paused = False
        self.resumed = 0
        self.buffered = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        self.written += parts

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False
        self.resumed += 1

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.buffered


@dataclass
class Heard:
    """A sink: what it was told, in order."""

    connection: EngineConnection | None = None
    wants: bool = True
    heads: list[tuple[int, bytes]] = field(default_factory=list)
    body: bytes = b""
    ended: int = 0
    failures: list[EngineFailure] = field(default_factory=list)

    def wants_connection(self) -> bool:
        return self.wants

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        self.heads.append((head.status, length))
        self.body += first

    def response_bytes(self, data: bytes) -> None:
        self.body += data

    def response_end(self) -> None:
        self.ended += 1

    def response_failed(self, failure: EngineFailure) -> None:
        self.failures.append(failure)


class Owners:
    """The pool as a connection sees it."""

    def __init__(self) -> None:
        self.released: list[bool] = []
        self.fresh: list[tuple[EngineRequest, bool]] = []
        self.gone = 0

    def made(self, connection: EngineConnection) -> None:
        self.connection = connection

    def release(self, connection: EngineConnection, reusable: bool) -> None:
        self.released.append(reusable)

    def lost(self, connection: EngineConnection) -> None:
        self.gone += 1

    def send_fresh(self, request: EngineRequest, sink: Any, *, lost: bool = False) -> None:
        self.fresh.append((request, lost))


@dataclass
class Line:
    kind: type[EngineConnection] = EngineConnection
    owners: Owners = field(default_factory=Owners)
    wire: Wire = field(default_factory=Wire)
    sink: Heard = field(default_factory=Heard)

    def __post_init__(self) -> None:
        self.connection = self.kind(self.owners)
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]

    def ask(self, request: EngineRequest = ASKED) -> Heard:
        self.sink = Heard()
        self.connection.send(request, self.sink)
        return self.sink

    def hear(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.data_received(piece)


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]
