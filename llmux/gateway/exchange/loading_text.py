"""What a chat client shows while its model does not answer yet: where the request stands, in words.

``gateway.loading_text`` turns it on. The words come in the field in which reasoning models think
aloud (``reasoning_content``): chat clients show it apart from the answer, and do not send it back
with the next request. They name no model but the client's own, since its key may see no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Protocol

from llmux import typed_json
from llmux.errors import Refused
from llmux.gateway.admission.queue import Ticket

logger = logging.getLogger(__name__)

LOOK_SECS: Final = 2.0  # between two looks; what is answered before the first is told nothing
OLD_SECS: Final = 10.0
ASK_SECS: Final = 10.0
MAX_WORDS: Final = 200  # characters of a step's name


class Asking(Protocol):
    async def ask(self, verb: str, args: dict[str, Any], timeout: float) -> Any: ...


class Admitting(Protocol):
    def usable(self, model: str) -> bool: ...
    def ahead_of(self, ticket: Any) -> int: ...
    def wanted(self) -> list[str]: ...


class Estimating(Protocol):
    def secs_until(self, model: str, wanted: Iterable[str]) -> float: ...


@dataclass(frozen=True, slots=True)
class _Progress:
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class _Step:
    """The part of a model's status that is told: the step of its operation, and what is left."""

    phase_text: str | None = None
    progress: _Progress | None = None
    left_secs: float | None = None


@dataclass(frozen=True, slots=True)
class _Status:
    models: dict[str, Any]  # of a _Step each: a bad one must not hide the others


class Standing:
    """Where requests stand; one for a worker. Asks the supervisor while somebody wants to know."""

    def __init__(
        self,
        link: Asking,
        admission: Admitting,
        switches: Estimating,
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._admission = admission
        self._switches = switches
        self._clock = clock
        self._steps: dict[str, _Step] = {}
        self._asked_at = self._answered_at = -inf
        self._asking: asyncio.Task[None] | None = None

    def of(self, ticket: Ticket) -> tuple[str, str]:
        """(what happens now and how many are ahead, that in words with the time that is left)."""
        what, amount, left = self._stage(ticket)
        ahead = self._admission.ahead_of(ticket)
        words = what + amount
        if left is not None and left >= 1.0:
            words += f", about {_span(left)} left"
        if ahead:
            words += f"; {ahead} request{'s' if ahead > 1 else ''} before this one"
        return f"{what}{amount}, {ahead}", words

    def _stage(self, ticket: Ticket) -> tuple[str, str, float | None]:
        model = ticket.model
        if ticket.in_flight:
            return "its engine has the request", "", None
        if self._admission.usable(model):
            return "waiting for a place at its engine", "", None
        step = self._steps.get(model)
        if step is not None and step.phase_text:
            return step.phase_text[:MAX_WORDS], _amount(step.progress), step.left_secs
        left = self._switches.secs_until(model, self._admission.wanted())
        return "waiting for room on a GPU", "", left

    def look(self) -> bool:
        """Ask again, in time. Returns whether there is an answer that is not of long ago."""
        now = self._clock()
        if self._asking is None and now - self._asked_at >= LOOK_SECS:
            self._asked_at = now
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        return now - self._answered_at < OLD_SECS

    async def _ask(self) -> None:
        try:
            status = await self._link.ask("status", {}, ASK_SECS)
            self._steps = _steps(typed_json.read(_Status, status).models)
        except (Refused, typed_json.BadJson) as error:
            logger.debug("cannot tell the clients what their models do: %s", error)
            self._steps = {}
        finally:
            self._asking, self._answered_at = None, self._clock()


class ChatText:
    """The text of one request, as events of its stream. ``name``: the client's of the model.
    ``interval``: seconds after which it is told again although nothing changed; 0: never."""

    __slots__ = ("_at", "_interval", "_looked", "_name", "_number", "_standing", "_told")

    def __init__(self, standing: Standing, name: str, number: str, interval: float) -> None:
        self._standing = standing
        self._name = name
        self._number = number
        self._interval = interval or inf
        self._looked = False
        self._told = ""
        self._at = -inf

    def event(self, ticket: Ticket, now: float) -> bytes:
        """Empty when there is nothing new to say."""
        known, first, self._looked = self._standing.look(), not self._looked, True
        if first and not known:  # at the next look more is known
            return b""
        told, words = self._standing.of(ticket)
        if told == self._told and now - self._at < self._interval:
            return b""
        self._told, self._at = told, now
        delta = {
            "role": "assistant",
            "content": None,
            "reasoning_content": f"{self._name}: {words}\n",
        }
        chunk = {
            "id": f"chatcmpl-{self._number}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self._name,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
        }
        return b"data: %b\n\n" % json.dumps(chunk).encode()


def _steps(rows: dict[str, Any]) -> dict[str, _Step]:
    steps = {}
    for model, row in rows.items():
        try:
            steps[model] = typed_json.read(_Step, row)
        except typed_json.BadJson as error:
            logger.debug("cannot tell the clients what %s does: %s", model, error)
    return steps


def _amount(progress: _Progress | None) -> str:
    if progress is None or progress.unit == "bytes":  # bytes would be news at each look
        return ""
    of = f" of {progress.total}" if progress.total else ""
    return f" ({progress.done}{of} {progress.unit})"


def _span(seconds: float) -> str:
    if seconds < 90.0:
        return f"{round(seconds)} s"
    return f"{round(seconds / 60)} min"
