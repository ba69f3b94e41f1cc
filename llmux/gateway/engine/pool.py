"""All connections to one engine under one lease, idle ones by the way they deliver a response.

A pool knows every connection it opened, because an engine may be checkpointed only when none is
left.
"""

from __future__ import annotations

import asyncio
import errno
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from llmux.gateway.engine.connection import EngineConnection, EngineFailure, Sink
from llmux.gateway.engine.request import Delivery, EngineRequest
from llmux.gateway.engine.rewriting import RenamingConnection, UnchunkingConnection
from llmux.protocol import Address

MAX_IDLE = 256  # idle connections kept of each kind; more concurrent streams are rare
CONNECT_SECS = 5.0  # an engine on the same machine that takes longer to accept is not healthy

_CONNECTIONS: Final[Mapping[Delivery, type[EngineConnection]]] = {
    Delivery.VERBATIM: EngineConnection,
    Delivery.UNCHUNKED: UnchunkingConnection,
    Delivery.RENAMED: RenamingConnection,
}


class EnginePool:
    """``on_empty`` is called when the pool is closed and its last connection is gone."""

    def __init__(self, address: Address, on_empty: Callable[[], None]) -> None:
        self.address = address
        self._on_empty = on_empty
        self._idle: defaultdict[type[EngineConnection], list[EngineConnection]] = defaultdict(list)
        self._open: set[EngineConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def empty(self) -> bool:
        return not self._open and not self._connecting

    def send(self, request: EngineRequest, sink: Sink) -> None:
        """Send at once on an idle connection, else on a new one."""
        idle = self._idle[_CONNECTIONS[request.delivery]]
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.send(request, sink)
                return
        self.send_fresh(request, sink)

    def send_fresh(self, request: EngineRequest, sink: Sink, *, lost: bool = False) -> None:
        """``lost``: the engine closed a connection with this request on it. When it accepts no
        other one it has died, perhaps of the request."""
        work = self._connect(request, sink, lost)
        task = asyncio.get_running_loop().create_task(work)
        self._connecting.add(task)
        task.add_done_callback(self._connect_done)

    def _connect_done(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        self._check_empty()

    async def _connect(self, request: EngineRequest, sink: Sink, lost: bool) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECS):
                connection = await self._open_connection(_CONNECTIONS[request.delivery])
        except TimeoutError:
            error = f"the engine at {self.address} does not accept connections"
            self._refused(sink, error, lost)
            return
        except OSError as failure:
            error = f"cannot connect to the engine at {self.address}: {failure.strerror or failure}"
            self._refused(sink, error, lost)
            return
        if not sink.wants_connection():
            self.release(connection, reusable=True)
        elif connection.transport.is_closing():
            sink.response_failed(EngineFailure("the engine closed the connection at once"))
        else:
            connection.send(request, sink)

    async def _open_connection(self, factory: type[EngineConnection]) -> EngineConnection:
        loop = asyncio.get_running_loop()
        delay = 0.005
        while True:
            try:
                uds, port = self.address.uds, self.address.port
                if uds is not None:
                    _, made = await loop.create_unix_connection(lambda: factory(self), uds)
                    return made
                assert port is not None, "an address has a socket path or a port"
                _, made = await loop.create_connection(lambda: factory(self), "127.0.0.1", port)
                return made
            except OSError as error:
                # connect() to a unix socket with a full backlog fails with EAGAIN; TCP would wait.
                if error.errno != errno.EAGAIN:
                    raise
            await asyncio.sleep(delay)
            delay = min(delay * 2, 0.1)

    @staticmethod
    def _refused(sink: Sink, error: str, lost: bool) -> None:
        if sink.wants_connection():
            sink.response_failed(EngineFailure(error, connected=lost))

    def made(self, connection: EngineConnection) -> None:
        self._open.add(connection)

    def release(self, connection: EngineConnection, reusable: bool) -> None:
        idle = self._idle[type(connection)]
        wanted = reusable and not self._closed and len(idle) < MAX_IDLE
        if not wanted or connection.transport.is_closing():
            connection.abort()
            return
        if connection.paused:
            connection.resume()
        idle.append(connection)

    def lost(self, connection: EngineConnection) -> None:
        self._open.discard(connection)
        idle = self._idle[type(connection)]
        if connection in idle:
            idle.remove(connection)
        self._check_empty()

    def close(self) -> None:
        """Close idle connections now and each used one when its request ends."""
        self._closed = True
        idle = [connection for kind in self._idle.values() for connection in kind]
        self._idle.clear()
        for connection in idle:
            connection.abort()
        self._check_empty()

    def reopen(self) -> None:
        self._closed = False

    def _check_empty(self) -> None:
        if self._closed and self.empty:
            self._on_empty()
