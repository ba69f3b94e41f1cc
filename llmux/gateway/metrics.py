"""/metrics: this worker's numbers, the supervisor's, the other workers', and the engines' own.

A scrape asks the supervisor once and each serving engine at most once in two seconds. It never
wakes a model, is in no count of requests, and is answered within its deadlines even when the
supervisor or an engine is not there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Sequence
from itertools import chain
from typing import Any

from llmux import metrics as m
from llmux.errors import Refused
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.engine_samples import merge
from llmux.gateway.engine_series import EngineSeries
from llmux.gateway.exposition import encode, negotiate
from llmux.metrics import ProcessNumbers, Snapshot, Store

logger = logging.getLogger(__name__)

SUPERVISOR_SECS = 1.0
TIMEOUT_HEADER = "x-prometheus-scrape-timeout-seconds"


class MetricsPage:
    """One per worker."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._worker = dispatch.worker
        self._engines = EngineSeries(dispatch)
        self._process = ProcessNumbers()

    async def scrape(self, accept: str, timeout: str) -> tuple[bytes, str]:
        """A page and its content type, in the format that an Accept header asks for. ``timeout`` is
        what Prometheus says of its own: after it the page would be lost with all that is on it."""
        own = self.snapshot()
        remote_secs = min(SUPERVISOR_SECS, _seconds(timeout) / 2)
        (remote, up), engines = await asyncio.gather(
            self._remote(own, remote_secs), self._engines.read()
        )
        store = Store()
        store.merge(own)
        for snapshot in remote.values():
            store.merge(snapshot)
        store.set(m.SUPERVISOR_UP, value=int(up))
        store.set(m.SUPERVISOR_SILENT, value=self._worker.link.silent_secs)
        families, dropped = merge(engines)
        for model, count in dropped.items():
            store.set(m.ENGINE_SAMPLES_DROPPED, model, value=count)
        form = negotiate(accept)
        return await encode(chain(store.families(), families), form), form.content_type

    async def _remote(self, own: Snapshot, seconds: float) -> tuple[dict[str, Any], bool]:
        args = {"worker": self._worker.name, "snapshot": own}
        try:
            return await self._worker.link.ask("metrics", args, seconds), True
        except Refused as problem:
            logger.debug("metrics without the supervisor's: %s", problem)
            return {}, False

    def snapshot(self) -> Snapshot:
        """What this worker alone knows."""
        worker = self._worker
        observer = worker.observer
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
        for model in worker.models:
            store.add(m.IN_FLIGHT, model, amount=0)
            store.add(m.QUEUE_DEPTH, model, amount=0)
            for counter_name in (m.BROKEN, m.ABANDONED, m.RETRIED):
                store.add(counter_name, model, amount=0)  # else increase() misses the first one
        for queue in worker.admission.queues():
            if queue.model in worker.models:
                store.add(m.IN_FLIGHT, queue.model, amount=queue.in_flight)
                store.add(m.QUEUE_DEPTH, queue.model, amount=len(queue.waiting))
                store.add(m.CHUNKS, queue.model, amount=queue.progress)
        store.set(m.CONNECTIONS, value=worker.clients)
        store.set(m.WORKERS, value=1)
        store.set(m.RECONNECTS, value=worker.link.connects)
        self._process.read_into(store)
        return store.snapshot()


def _seconds(timeout: str) -> float:
    """The value of a ``TIMEOUT_HEADER``; infinity for none and for what is no number of seconds."""
    try:
        seconds = float(timeout)
    except ValueError:
        return math.inf
    return seconds if seconds > 0 else math.inf


# ---- the port of their own ----------------------------------------------------------------------

HEAD_SECS = 10.0
MAX_HEAD = 16 * 1024


async def serve_metrics(
    page: MetricsPage, sockets: Sequence[socket.socket]
) -> list[asyncio.Server]:
    """GET /metrics and nothing else, for every client that can connect; one request a
    connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_SECS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await _answer(page, head))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except asyncio.LimitOverrunError:
            writer.write(_response("431 Request Header Fields Too Large", b""))
        finally:
            writer.close()

    return [await asyncio.start_server(serve, sock=sock, limit=MAX_HEAD) for sock in sockets]


async def _answer(page: MetricsPage, head: bytes) -> bytes:
    first, *headers = head.split(b"\r\n")
    method, _, rest = first.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if path != b"/metrics":
        return _response("404 Not Found", b"only /metrics is here\n")
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", b"only GET\n", "allow: GET, HEAD\r\n")
    named = [header.partition(b":") for header in headers]
    accept, timeout = (
        b",".join(value for name, _, value in named if name.lower() == wanted).decode("latin-1")
        for wanted in (b"accept", TIMEOUT_HEADER.encode())
    )
    body, content_type = await page.scrape(accept, timeout)
    whole = _response("200 OK", body, content_type=content_type)
    return whole if method == b"GET" else whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _response(
    status: str, body: bytes, extra: str = "", content_type: str = "text/plain; charset=utf-8"
) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        f"{extra}connection: close\r\n\r\n"
    ).encode() + body
