"""One request as it came from a client, and the heads made of it for engines and for Sanic.

Heads are written anew from the parsed header list, never copied: an engine gets exactly one length,
measured by us, and none of the headers that are about the client's connection.
"""

from __future__ import annotations

import itertools
import os
from itertools import chain
from typing import TYPE_CHECKING, Any

import httptools

from llmux.errors import Reason, Refused
from llmux.gateway import openai, routes
from llmux.gateway.forms import FormError, ModelFinder, Upload, boundary_of
from llmux.gateway.heads import BadHead
from llmux.gateway.limits import KeyUse
from llmux.gateway.problems import error_response
from llmux.gateway.request_head import NO_HEAD, Headers, HeadReader
from llmux.gateway.routes import Match, Source

if TYPE_CHECKING:
    from llmux.gateway.cors import Cors

# What a request target may contain.
_TARGET = bytes(range(0x21, 0x7F))
WISHES = frozenset({b"upgrade", b"http2-settings"})

_prefix = os.urandom(6).hex()
_count = itertools.count(1)


def _new_prefix() -> None:
    """Forked workers must not give the same ids."""
    global _prefix
    _prefix = os.urandom(6).hex()


os.register_at_fork(after_in_child=_new_prefix)


def new_request_id() -> bytes:
    """Unique without a system call per request: a random prefix per process and a counter."""
    return b"req-%b-%x" % (_prefix.encode(), next(_count))


class Incoming:
    """Filled by the client's parser; complete when ``body`` is whole or ``problem`` is set."""

    __slots__ = (
        "body", "finder", "head", "headers", "keep_alive", "key", "length", "match", "method",
        "problem", "request_id", "target", "upload", "withheld",
    )  # fmt: skip

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.headers: Headers = []
        self.head = NO_HEAD
        self.body = b""
        self.length = 0  # announced; 0 = none or chunked
        self.keep_alive = True
        self.request_id = b""
        self.problem: Refused | None = None
        self.match: Match | None = None  # the way to an engine, if there is one
        self.upload: Upload | None = None  # in place of ``body``
        self.finder: ModelFinder | None = None
        self.key: KeyUse | None = None  # whose request it is, where keys are asked for …
        self.withheld = False  # … and given, so that no engine gets them

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]

    def head_bytes(self) -> int:
        """About as many as came: blanks around a value are not in it."""
        values = sum(map(len, chain.from_iterable(self.headers)))
        return len(self.target) + values + 4 * len(self.headers)

    def read_head(self, version: str, reader: HeadReader) -> None:
        """Raises BadHead."""
        if not self.target or self.target.translate(None, _TARGET):
            raise BadHead("the request target contains a space, a control or a non-ASCII character")
        self.head, self.length = reader.read(self.headers, version)
        self.request_id = self.head.request_id or new_request_id()

    def header(self, name: bytes) -> bytes:
        """The first of that (lower-case) name, b"" without one."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    def find_route(self) -> None:
        """Whether this goes to an engine; the engine is then asked for its own path."""
        if self.method == b"POST":  # the common case first: an engine's own path and no query
            match = routes.POSTS.get(self.target)
            if match is not None and match.path == self.target:
                self.match = match
                return
        path, mark, query = self.target.partition(b"?")
        self.match = match = routes.find(self.method, path)
        if match is not None and match.path != path:
            self.target = match.path + mark + query

    def target_is_readable(self) -> bool:
        """Sanic ends a connection without an answer when it cannot parse the target."""
        try:
            return httptools.parse_url(self.target).path is not None
        except httptools.HttpParserInvalidURLError:
            return False

    def begin_upload(self) -> None:
        """Raises Refused."""
        try:
            self.finder = ModelFinder(boundary_of(self.header(b"content-type")))
        except FormError as error:
            raise _unreadable(error) from None
        self.upload = Upload()

    def add_upload(self, data: bytes) -> str | None:
        """The model's name as soon as it is known. Raises Refused."""
        assert self.upload is not None and self.finder is not None, "an upload was begun"
        try:
            self.upload.write(data)
            self.finder.feed(data)
        except FormError as error:
            raise _unreadable(error) from None
        except OSError as error:
            cause = error.strerror or str(error)
            raise Refused(Reason.INTERNAL, f"cannot keep the upload: {cause}") from None
        path_says = self.match.model if self.match is not None else None
        return path_says or self.finder.model

    def model(self) -> str | None:
        """The name the client gave, once the body is whole; None: the path's id must tell.
        Raises Refused."""
        match = self.match
        assert match is not None, "asked of requests for engines only"
        if match.model is not None:
            return match.model
        if match.route.source is Source.JSON:
            return openai.model_of(self.body)
        if match.route.source is Source.RESPONSE_ID:
            return None
        name = self.finder.model if self.finder is not None else None
        if not name:
            raise openai.no_model("missing" if name is None else "empty")
        return name

    def name_in_body(self) -> str | None:
        """What the body calls the model, whatever the path says."""
        assert self.match is not None, "asked of requests for engines only"
        if self.upload is not None:
            return self.finder.model if self.finder is not None else None
        if self.match.route.source is not Source.JSON:
            return None
        try:
            return openai.model_of(self.body)
        except Refused:
            return None  # the engine says what is wrong with it

    def call_model(self, alias: str, model: str) -> None:
        """Write the model's own name where the client wrote an alias: engines know but one."""
        assert self.match is not None, "asked of requests for engines only"
        if self.match.model is not None and self.name_in_body() != alias:
            return  # the alias was in the path
        if self.upload is None:
            self.body = openai.renamed(self.body, model)
        elif self.finder is not None:
            self.upload.replace(*self.finder.span, model.encode())

    @property
    def anthropic(self) -> bool:
        return self.match is not None and self.match.route.anthropic

    def engine_head(self) -> bytes:
        size = len(self.body) if self.upload is None else self.upload.size
        credentials = b"" if self.withheld else self.head.credentials
        return b"%b %b HTTP/1.1\r\n%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            self.method, self.target, self.head.forwarded, credentials, self.request_id, size,
        )  # fmt: skip

    def refusal(self, problem: Refused, cors: Cors | None, *, close: bool) -> bytes:
        """The whole answer; for HEAD its head."""
        extra = b"x-request-id: %b\r\n" % self.request_id
        if self.head.origin and cors is not None:
            extra += cors.headers(self.head.origin)
        whole = error_response(problem, extra=extra, close=close, anthropic=self.anthropic)
        return whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if self.method == b"HEAD" else whole

    def sanic_request(self, *, close: bool) -> bytes:
        """The whole request in the one plain form that Sanic gets to see."""
        lines = b"%bx-request-id: %b\r\ncontent-length: %d\r\nconnection: %b\r\n" % (
            self.head.forwarded, self.request_id, len(self.body),
            b"close" if close or not self.keep_alive else b"keep-alive",
        )  # fmt: skip
        version = b"HTTP/1.0" if self.head.version_1_0 else b"HTTP/1.1"
        return b"%b %b %b\r\n%b\r\n%b" % (self.method, self.target, version, lines, self.body)


def _unreadable(error: FormError) -> Refused:
    return Refused(Reason.BAD_REQUEST, f"cannot read the request body: {error}")


def plain_head(parser: Any, target: bytes, headers: Headers) -> bytes:
    """The request's head again, without the wish for another protocol. What could be read in more
    than one way makes it one that no parser takes."""
    version = parser.get_http_version().encode()
    kept = [name + b": " + value for name, value in headers if name.lower() not in WISHES]
    head = b"\r\n".join(
        [parser.get_method() + b" " + target + b" HTTP/" + version, *kept, b"", b""]
    )
    return head if head.count(b"\n") == head.count(b"\r") == len(kept) + 2 else b"\0\r\n\r\n"
