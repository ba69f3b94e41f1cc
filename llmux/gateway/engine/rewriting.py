"""Connections that rewrite the response: for HTTP/1.0 clients, and under an alias."""

from __future__ import annotations

import json
import re

from llmux.gateway.engine.answer_head import NO_BODY
from llmux.gateway.engine.connection import EngineConnection, Owner, Sink
from llmux.gateway.engine.request import EngineRequest


class UnchunkingConnection(EngineConnection):
    """For HTTP/1.0 clients, which do not know chunks: passes on the body alone."""

    __slots__ = ()

    def __init__(self, pool: Owner) -> None:
        super().__init__(pool)
        self._pieces = []

    def send(self, request: EngineRequest, sink: Sink) -> None:
        self._pieces = []
        super().send(request, sink)

    def on_body(self, body: bytes) -> None:
        assert self._pieces is not None, "set as long as this object exists"
        self._pieces.append(body)


class RenamingConnection(UnchunkingConnection):
    """For requests that used an alias: vLLM answers with the first of its names, whichever the
    request used (models/serving.py of 0.32); the client gets the name that it sent.

    ``"model":"<name>"`` cannot stand inside a JSON string, where its quotes would be escaped.
    """

    __slots__ = ("_alias", "_framed", "_held", "_longest", "_name")

    def send(self, request: EngineRequest, sink: Sink) -> None:
        assert request.rename is not None, "the pool chose this class for its delivery"
        name, alias, self._framed = request.rename
        quoted = json.dumps(name).encode()
        self._name = re.compile(rb'("model":\s?)' + re.escape(quoted))
        self._longest = len(b'"model": ') + len(quoted)
        self._alias = json.dumps(alias).encode()
        self._held = b""
        super().send(request, sink)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._framed = self._framed and self._parser.get_status_code() not in NO_BODY

    def on_chunk_header(self) -> None:
        """Stay between chunks: only whole chunks of our own are passed on."""

    def _passed(self, data: bytes) -> bytes:
        body = self._name.sub(lambda m: m[1] + self._alias, self._held + super()._passed(data))
        self._held = b""
        if not self._complete:
            # The name may continue in the next piece; an event ends with a line break and is whole.
            start = body.rfind(b'"model":', -self._longest - 8)
            if start < 0:
                start = len(body) - _begun(body)
            if len(body) - start < self._longest:
                body, self._held = body[:start], body[start:]
        if not self._framed or self.until_close:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk + b"0\r\n\r\n" if self._complete else chunk


def _begun(body: bytes) -> int:
    """Length of the longest suffix that may be the beginning of the key."""
    key = b'"model":'
    return next((size for size in range(len(key), 0, -1) if body.endswith(key[:size])), 0)
