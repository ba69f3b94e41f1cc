"""Engines' own ``vllm:`` series, with a model label, for /metrics.

Only engines that this worker holds a grant for are asked, over the lease's own pool: a revoke waits
for the connection, whose deadline is short. It is in no count of requests, so an engine that is
only scraped is idle.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from llmux.gateway.answer_head import AnswerHead
from llmux.gateway.reshaping import UnchunkingConnection
from llmux.gateway.tickets import Lease
from llmux.gateway.upstream import EngineConnection, EngineFailure
from llmux.metrics import escape

if TYPE_CHECKING:
    from llmux.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

ENGINE_SECS = 0.5
ENGINE_CACHE_SECS = 2.0
MAX_BYTES = 4 * 1024 * 1024
PREFIX = "vllm:"

_HEAD = b"GET /metrics HTTP/1.1\r\nhost: engine\r\naccept: text/plain\r\ncontent-length: 0\r\n\r\n"


class _Scrape:
    """A sink of the engine pool (upstream.Sink): one GET, whose answer is kept."""

    def __init__(self) -> None:
        self.connection: EngineConnection | None = None
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._parts: list[bytes] = []
        self._size = 0
        self._good = False

    def payload(self) -> tuple[bytes, bytes]:
        return _HEAD, b""

    def connection_type(self) -> type[EngineConnection]:
        return UnchunkingConnection

    def renaming(self) -> tuple[str, str, bool]:
        raise AssertionError("asked of renaming connections only")

    def wants_connection(self) -> bool:
        return not self.done.done() and self.connection is None

    def unsent(self) -> int:
        return 0

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
    """The last answer of every engine, by model and epoch."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._cache: dict[str, tuple[str, float, bytes]] = {}

    async def text(self) -> str:
        leases = [
            line.lease
            for line in self._gateway.admission.lines()
            if line.lease is not None and line.lease.suspect_until is None
        ]
        answers = await asyncio.gather(*(self._answer(lease) for lease in leases))
        self._cache = {
            lease.model: self._cache[lease.model] for lease in leases if lease.model in self._cache
        }
        texts = zip([lease.model for lease in leases], answers, strict=True)
        return merge_series({model: answer.decode(errors="replace") for model, answer in texts})

    async def _answer(self, lease: Lease) -> bytes:
        now = self._gateway.clock()
        epoch, at, answer = self._cache.get(lease.model, ("", 0.0, b""))
        if epoch == lease.epoch and now - at < ENGINE_CACHE_SECS:
            return answer
        scrape = _Scrape()
        self._gateway.pool(lease).send(scrape)
        try:
            async with asyncio.timeout(ENGINE_SECS):
                answer = await scrape.done
        except TimeoutError:
            answer = b""
        finally:
            scrape.close()
        self._cache[lease.model] = (lease.epoch, now, answer)
        return answer


def merge_series(texts: dict[str, str]) -> str:
    """The ``vllm:`` families of several engines as one exposition, each sample with its model.

    A family's comments come once and all its samples together, as the format demands.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for model, text in sorted(texts.items()):
        label = f'model="{escape(model)}"'
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                words = line.split(" ", 3)
                if len(words) >= 3 and words[2].startswith(PREFIX):
                    family = words[2]
                    known = comments.setdefault(family, [])
                    if not any(other.startswith(f"# {words[1]} ") for other in known):
                        known.append(line)
            elif line.startswith(PREFIX) and (labelled := _labelled(line, label)) is not None:
                name = line.partition("{")[0].partition(" ")[0]
                home = family if family and name.startswith(family) else name
                samples.setdefault(home, []).append(labelled)
    lines = [line for family in samples for line in (*comments.get(family, ()), *samples[family])]
    return "\n".join([*lines, ""]) if lines else ""


def _labelled(line: str, label: str) -> str | None:
    name, brace, rest = line.partition("{")
    if brace:
        if rest.startswith('model="') or ',model="' in rest:
            return None  # an engine's own label of that name would make two
        return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}" if value else None
