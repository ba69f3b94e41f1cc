"""Journal entries about single requests: failures, with the request's id and its model.

An overload fails thousands of requests alike, so lines of one kind are rate-limited, and the next
line says how many were suppressed. Texts that may quote the client's input are not logged; the
response has them, and /metrics counts every request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from typing import Any, Final

from llmux.errors import Reason, Refused
from llmux.gateway.http.problems import status_of

logger = logging.getLogger(__name__)

BURST: Final = 5  # lines of one kind (model and reason) …
BURST_SECS: Final = 10.0  # … per this interval
MAX_TEXT: Final = 300

# Expected by the operator, who set the limit or stopped the service: no warning.
_EXPECTED: Final = frozenset(
    {Reason.OVERLOADED, Reason.QUEUE_FULL, Reason.RATE_LIMITED, Reason.SHUTTING_DOWN}
)


class RequestLog:
    """``known``: the configured models; other names are client input and are not logged."""

    def __init__(self, clock: Callable[[], float], known: Container[str] = ()) -> None:
        self._clock = clock
        self.known = known
        self._kinds: dict[tuple[str, str], _Kind] = {}  # as many as models × reasons

    def refused(self, problem: Refused, *, request: bytes, model: str = "") -> None:
        """The request was answered with this error alone."""
        status = status_of(problem)
        level = logging.DEBUG
        if problem.reason in _EXPECTED:
            level = logging.INFO
        elif status >= 500:
            level = logging.WARNING
        self._say(level, f"request refused with {status}", problem, request, model)

    def broken(self, problem: Refused, *, request: bytes, model: str) -> None:
        """A response that had begun ended with this error."""
        level = logging.INFO if problem.reason in _EXPECTED else logging.WARNING
        self._say(level, "answer broken off", problem, request, model)

    def again(self, problem: Refused, *, request: bytes, model: str) -> None:
        """No byte of a response was received: the request waits for the next engine."""
        self._say(logging.INFO, "request waits again", problem, request, model)

    def _say(self, level: int, what: str, problem: Refused, request: bytes, model: str) -> None:
        if not logger.isEnabledFor(level):
            return
        model = model if model in self.known else ""
        left_out = self._left_out(model, what + problem.reason)
        if left_out is None:
            return
        text = _text(problem)
        more = f" ({left_out} more since the last such line)" if left_out else ""
        logger.log(
            level, "%s, %s%s%s", what, problem.reason, text, more,
            extra={
                "request": request.decode("ascii", "replace"),
                "model": model or None,
                "reason": problem.reason.value,
            },
        )  # fmt: skip

    def _left_out(self, model: str, what: str) -> int | None:
        """How many lines of this kind were suppressed before this one; None: suppress this one."""
        kind = self._kinds.get((model, what))
        if kind is None:
            kind = self._kinds[model, what] = _Kind()
        now = self._clock()
        if now >= kind.until:
            kind.until, kind.written = now + BURST_SECS, 0
        if kind.written >= BURST:
            kind.left_out += 1
            return None
        kind.written += 1
        left_out, kind.left_out = kind.left_out, 0
        return left_out


class _Kind:
    __slots__ = ("left_out", "until", "written")

    def __init__(self) -> None:
        self.until = float("-inf")
        self.written = 0
        self.left_out = 0


def _text(problem: Refused) -> str:
    """The text for the journal; empty for client errors, whose text may quote the request."""
    if status_of(problem) < 429:
        return ""
    return ": " + problem.message.partition("\n")[0][:MAX_TEXT]


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's handler of uncaught exceptions: as the loop's own, with the request's id."""
    protocol = context.get("protocol")
    exchange = getattr(protocol, "exchange", None) or getattr(protocol, "sink", None)
    request = getattr(exchange, "request_id", None)
    if not isinstance(request, bytes):
        loop.default_exception_handler(context)
        return
    logger.error(
        "internal error: %s", context.get("message") or "unhandled exception",
        exc_info=context.get("exception"),
        extra={
            "request": request.decode("ascii", "replace"),
            "model": getattr(exchange, "model", None),
        },
    )  # fmt: skip
