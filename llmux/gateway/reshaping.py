"""Connections whose answers do not pass as they come: for HTTP/1.0 clients, and under an alias."""

from __future__ import annotations

import json
import re

from llmux.gateway.answer_head import NO_BODY
from llmux.gateway.pool import EnginePool
from llmux.gateway.upstream import EngineConnection, Sink


class UnchunkingConnection(EngineConnection):
    """For HTTP/1.0 clients, which do not know chunks: passes on the body alone."""

    __slots__ = ()

    def __init__(self, pool: EnginePool) -> None:
        super().__init__(pool)
        self._pieces = []

    def send(self, sink: Sink) -> None:
        self._pieces = []
        super().send(sink)

    def on_body(self, body: bytes) -> None:
        assert self._pieces is not None, "set for as long as this object lives"
        self._pieces.append(body)


class RenamingConnection(UnchunkingConnection):
    """For requests that used an alias: vLLM answers with the first of its names whatever it was
    called (models/serving.py of 0.32), the client gets to read the name that it sent.

    ``"model":"<name>"`` cannot stand inside a JSON string, where its quotes would be escaped.
    """

    __slots__ = ("_alias", "_framed", "_held", "_longest", "_name")

    def send(self, sink: Sink) -> None:
        name, alias, self._framed = sink.renaming()
        quoted = json.dumps(name).encode()
        self._name = re.compile(rb'("model":\s?)' + re.escape(quoted))
        self._longest = len(b'"model": ') + len(quoted)
        self._alias = json.dumps(alias).encode()
        self._held = b""
        super().send(sink)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._framed = self._framed and self._parser.get_status_code() not in NO_BODY

    def on_chunk_header(self) -> None:
        """What is passed on are whole chunks of our own: it always ends between two."""

    def _passed(self, data: bytes) -> bytes:
        body = self._name.sub(lambda m: m[1] + self._alias, self._held + super()._passed(data))
        self._held = b""
        if not self._complete:
            # The name may go on in the next piece; an event ends with a line break and is whole.
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
    """How many bytes at the end may be the beginning of the key."""
    key = b'"model":'
    return next((size for size in range(len(key), 0, -1) if body.endswith(key[:size])), 0)
