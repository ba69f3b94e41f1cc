"""Receives the body of one request: bounded, within the worker's budget, and out of the loop's way.

1. no body is needed (OPTIONS, GET, unknown paths, health): skipped, a large one refused
2. an order: at most ``MAX_CONTROL_BODY``
3. a form: searched for the model, kept in a file when it is long
4. JSON for an engine: kept in pieces up to ``MAX_PIECES_BYTES``, then as a form is

A JSON body of case 4 is parsed when it is complete if it is short, and in passing if it is long.
"""

from __future__ import annotations

from typing import Any, Final

from llmux.gateway.http import openai, openapi
from llmux.gateway.http.problems import Moved, too_large, unsupported_encoding
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.routes import JSON, Match, Source
from llmux.gateway.worker import Worker

MAX_SKIPPED_BODY: Final = 16 * 1024
MAX_CONTROL_BODY: Final = 1024 * 1024
MAX_PIECES_BYTES: Final = 64 * 1024  # parsing so much takes less than a millisecond


class BodyReceiver:
    """``size``: bytes received of the current body. ``begin`` and ``add`` raise Refused.

    A body is mostly one piece: ``pieces`` has what came after it, for ``join``.
    """

    __slots__ = ("_limit", "_skip", "_worker", "pieces", "size")

    def __init__(self, worker: Worker[Any]) -> None:
        self._worker = worker
        self._limit = 0
        self._skip = False
        self.pieces: list[bytes] = []
        self.size = 0

    def begin(self, incoming: Incoming) -> None:
        worker, match, length = self._worker, incoming.match, incoming.length
        self.size = 0
        self._skip = False
        if incoming.head.encoding:
            raise unsupported_encoding(incoming.head.encoding)
        limit = worker.max_body_bytes
        if match is None or match.route.source is not JSON:
            limit = min(self._begin_other(incoming, match), limit)
        self._limit = limit
        if length > limit:
            raise too_large(limit)
        budget = worker.bodies
        full = budget.used + length > budget.long_limit and not budget.has_room(0, length)
        if full and not self._skip:
            raise budget.exceeded()

    def _begin_other(self, incoming: Incoming, match: Match | None) -> int:
        """No JSON for an engine. Returns the limit."""
        if match is None:
            if location := openapi.without_slash(incoming.target):
                raise Moved(incoming.target, location)
            self._skip = not _takes_body(incoming)
            return MAX_SKIPPED_BODY if self._skip else MAX_CONTROL_BODY
        if match.route.source is not Source.FORM:
            return MAX_CONTROL_BODY
        incoming.begin_form()
        return self._worker.max_body_bytes

    def add(self, incoming: Incoming, data: bytes) -> None:
        size = self.size = self.size + len(data)
        if size > self._limit:
            raise too_large(self._limit)
        if self._skip:
            return
        incoming.hold(len(data))
        if incoming.upload is not None:
            self._upload(incoming, data)
        elif size > MAX_PIECES_BYTES and incoming.match is not None:
            pieces, self.pieces = [incoming.body, *self.pieces, data], []
            incoming.body = b""
            incoming.begin_json()
            for piece in pieces:
                self._upload(incoming, piece)
        elif incoming.body:
            self.pieces.append(data)
        else:
            incoming.body = data

    def _upload(self, incoming: Incoming, data: bytes) -> None:
        model = incoming.add_upload(data)
        if model and self._worker.model_of(model) is None:
            raise openai.unknown_model(model)  # before the rest is sent

    def join(self, incoming: Incoming) -> None:
        incoming.body = b"".join((incoming.body, *self.pieces))
        self.pieces = []


def _takes_body(incoming: Incoming) -> bool:
    path = incoming.path
    return incoming.method == b"POST" and (path.startswith(b"/control/") or path == b"/unload")
