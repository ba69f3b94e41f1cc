"""/metrics: this worker's numbers, the supervisor's, the other workers', and the engines' own.

A scrape asks the supervisor once and each serving engine at most once in ``ENGINE_CACHE_SECS``. It
never wakes a model, is in no count of requests, and is answered within its deadlines even when the
supervisor or an engine is not there.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmux import metrics as m
from llmux.errors import Refused
from llmux.gateway.scrape import EngineSeries
from llmux.metrics import Snapshot, Store

if TYPE_CHECKING:
    from llmux.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SUPERVISOR_SECS = 1.0


class Exposition:
    """One per worker. ``worker`` is its name at the supervisor."""

    def __init__(self, gateway: Gateway, worker: str) -> None:
        self._gateway = gateway
        self._worker = worker
        self._engines = EngineSeries(gateway)

    async def text(self) -> str:
        own = self.snapshot()
        (remote, up), engines = await asyncio.gather(self._remote(own), self._engines.text())
        store = Store()
        store.merge(own)
        for snapshot in remote.values():
            store.merge(snapshot)
        store.set(m.SUPERVISOR_UP, value=int(up))
        return f"{store.render()}{engines}"

    async def _remote(self, own: Snapshot) -> tuple[dict[str, Any], bool]:
        args = {"worker": self._worker, "snapshot": own}
        try:
            return await self._gateway.link.ask("metrics", args, SUPERVISOR_SECS), True
        except Refused as problem:
            logger.debug("metrics without the supervisor's: %s", problem)
            return {}, False

    def snapshot(self) -> Snapshot:
        """What this worker alone knows."""
        gateway = self._gateway
        observer = gateway.observer
        store = Store()
        for (model, code), count in observer.requests.items():
            store.add(m.REQUESTS, model, str(code), amount=count)
        for name, counter in (
            (m.BROKEN, observer.broken),
            (m.ABANDONED, observer.abandoned),
            (m.RETRIED, observer.retried),
        ):
            for model, count in counter.items():
                store.add(name, model, amount=count)
        for model, times in observer.times.items():
            for name, histogram in (
                (m.REQUEST_SECONDS, times.durations),
                (m.QUEUE_WAIT, times.waits),
                (m.FIRST_TOKEN, times.first_tokens),
            ):
                if any(histogram.counts):
                    store.histogram(name, model).add(histogram.counts, histogram.sum)
        for model in gateway.models:
            store.add(m.IN_FLIGHT, model, amount=0)
            store.add(m.QUEUE_DEPTH, model, amount=0)
        for line in gateway.admission.lines():
            if line.model in gateway.models:
                store.add(m.IN_FLIGHT, line.model, amount=line.in_flight)
                store.add(m.QUEUE_DEPTH, line.model, amount=len(line.waiting))
                store.add(m.CHUNKS, line.model, amount=line.progress)
        store.set(m.CONNECTIONS, value=gateway.clients)
        store.set(m.WORKERS, value=1)
        store.set(m.RECONNECTS, value=gateway.link.connects)
        return store.snapshot()


# ---- the port of their own ----------------------------------------------------------------------

HEAD_SECS = 10.0
MAX_HEAD = 16 * 1024


async def serve_metrics(
    exposition: Exposition, sockets: Sequence[socket.socket]
) -> list[asyncio.Server]:
    """GET /metrics and nothing else, to whoever can connect; one request a connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_SECS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await _answer(exposition, head))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except asyncio.LimitOverrunError:
            writer.write(_response("431 Request Header Fields Too Large", ""))
        finally:
            writer.close()

    return [await asyncio.start_server(serve, sock=sock, limit=MAX_HEAD) for sock in sockets]


async def _answer(exposition: Exposition, head: bytes) -> bytes:
    method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if path != b"/metrics":
        return _response("404 Not Found", "only /metrics is here\n")
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", "only GET\n", "allow: GET, HEAD\r\n")
    whole = _response("200 OK", await exposition.text())
    return whole if method == b"GET" else whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _response(status: str, body: str, extra: str = "") -> bytes:
    data = body.encode()
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {len(data)}\r\n"
        f"{extra}connection: close\r\n\r\n"
    ).encode() + data
