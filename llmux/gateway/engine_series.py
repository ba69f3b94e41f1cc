"""Engines' own ``vllm:`` series, with a model label, for /metrics.

Only engines that this worker holds a grant for are asked, over the lease's own pool: a revoke waits
for the connection, whose deadline is short. It is in no count of requests, so an engine that is
only scraped is idle.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from llmux.engines import METRICS_PREFIXES
from llmux.gateway.admission.queue import Lease
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.engine.answer_head import AnswerHead
from llmux.gateway.engine.connection import EngineConnection, EngineFailure
from llmux.gateway.engine.request import Delivery, EngineRequest
from llmux.gateway.engine_samples import EngineSamples, parse

logger = logging.getLogger(__name__)

ENGINE_SECS = 0.5
ENGINE_CACHE_SECS = 2.0
MAX_BYTES = 2 * 1024 * 1024

_REQUEST = EngineRequest(
    b"GET /metrics HTTP/1.1\r\nhost: engine\r\naccept: text/plain\r\ncontent-length: 0\r\n\r\n",
    b"",
    Delivery.UNCHUNKED,
)


class _Scrape:
    """A sink of the engine pool: one GET, whose answer is kept."""

    def __init__(self) -> None:
        self.connection: EngineConnection | None = None
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._parts: list[bytes] = []
        self._size = 0
        self._good = False

    def wants_connection(self) -> bool:
        return not self.done.done() and self.connection is None

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        self._good = head.status == 200
        self.response_bytes(first)

    def response_bytes(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= MAX_BYTES:
            self._parts.append(data)

    def response_end(self) -> None:
        if not self.done.done():
            whole = self._good and self._size <= MAX_BYTES
            self.done.set_result(b"".join(self._parts) if whole else b"")

    def response_failed(self, failure: EngineFailure) -> None:
        if not self.done.done():
            self.done.set_result(b"")

    def close(self) -> None:
        """Nothing more is wanted; a connection in use is given up."""
        self.done.cancel()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()


class EngineSeries:
    """The last samples of every engine, by model and epoch."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._cache: dict[str, tuple[str, float, EngineSamples]] = {}

    async def read(self) -> dict[str, EngineSamples]:
        """The samples of each engine that was asked, by model; none of one that is silent."""
        leases = [
            queue.lease
            for queue in self._dispatch.worker.admission.queues()
            if queue.lease is not None and queue.lease.suspect_until is None
        ]
        answers = await asyncio.gather(*(self._samples(lease) for lease in leases))
        self._cache = {
            lease.model: self._cache[lease.model] for lease in leases if lease.model in self._cache
        }
        return {lease.model: samples for lease, samples in zip(leases, answers, strict=True)}

    async def _samples(self, lease: Lease[Any]) -> EngineSamples:
        now = self._dispatch.worker.clock()
        epoch, at, samples = self._cache.get(lease.model, ("", 0.0, EngineSamples()))
        if epoch == lease.epoch and now - at < ENGINE_CACHE_SECS:
            return samples
        samples = await parse(await self._fetch(lease), METRICS_PREFIXES)
        self._cache[lease.model] = (lease.epoch, now, samples)
        return samples

    async def _fetch(self, lease: Lease[Any]) -> bytes:
        scrape = _Scrape()
        self._dispatch.pool(lease).send(_REQUEST, scrape)
        try:
            async with asyncio.timeout(ENGINE_SECS):
                return await scrape.done
        except TimeoutError:
            return b""
        finally:
            scrape.close()
