"""Is the engine that answered 500 alive? One GET /health on its pool, as a supervisor asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from llmux.gateway.engine.answer_head import AnswerHead
from llmux.gateway.engine.connection import EngineConnection, EngineFailure
from llmux.gateway.engine.pool import EnginePool
from llmux.gateway.engine.request import EngineRequest

PATIENCE_SECS: Final = 2.0  # an engine that computes answers later: that is no death

_REQUEST: Final = EngineRequest(
    b"GET /health HTTP/1.1\r\nhost: engine\r\ncontent-length: 0\r\n\r\n", b""
)


class HealthQuestion:
    """A sink of the engine pool. Calls ``judged`` once: with the failure of an engine that says it
    is dead or cannot be reached, with None for any other, also one that talks nonsense."""

    def __init__(self, pool: EnginePool, judged: Callable[[EngineFailure | None], None]) -> None:
        self.connection: EngineConnection | None = None
        self._judged: Callable[[EngineFailure | None], None] | None = judged
        self._failure: EngineFailure | None = None
        self._timer = asyncio.get_running_loop().call_later(PATIENCE_SECS, self._give_up)
        pool.send(_REQUEST, self)

    def wants_connection(self) -> bool:
        return self._judged is not None and self.connection is None

    def response_head(self, head: AnswerHead, length: bytes, first: bytes) -> None:
        if head.status != 200:
            self._failure = EngineFailure(f"it answered 500, and {head.status} to /health")

    def response_bytes(self, data: bytes) -> None:
        pass

    def response_end(self) -> None:
        self._judge(self._failure)

    def response_failed(self, failure: EngineFailure) -> None:
        self._judge(None if failure.malformed else failure)

    def _give_up(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
        self._judge(None)

    def _judge(self, failure: EngineFailure | None) -> None:
        judged, self._judged = self._judged, None
        self._timer.cancel()
        if judged is not None:
            judged(failure)
