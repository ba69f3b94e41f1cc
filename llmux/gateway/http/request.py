"""One request of a client, and the heads written from it for engines and for Sanic.

Heads are written from the parsed header list, never copied: an engine gets exactly one length,
measured by us, and none of the headers that concern the client's connection.
"""

from __future__ import annotations

import itertools
import os
import re
from itertools import chain
from typing import Any

import httptools

from llmux.errors import Reason, Refused
from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.http import openai, routes
from llmux.gateway.http.budget import BodyBudget
from llmux.gateway.http.heads import BadHead
from llmux.gateway.http.json_finder import JsonError, JsonFinder
from llmux.gateway.http.multipart import FormError, ModelFinder, Upload, boundary_of
from llmux.gateway.http.openai import JsonBody
from llmux.gateway.http.request_head import NO_HEAD, Headers, HeadReader
from llmux.gateway.http.routes import Match, Source

# The bytes a request target may contain.
_TARGET = bytes(range(0x21, 0x7F))
# A target in absolute-form, which a server must take (RFC 9112 3.2.2); one with user information
# is an error (RFC 9110 4.2.4).
_ABSOLUTE = re.compile(rb"https?://([^/?#@]++)(?!@)", re.IGNORECASE)  # without user information
UPGRADE_HEADERS = frozenset({b"upgrade", b"http2-settings"})
NO_BUDGET = BodyBudget(0)

_prefix = os.urandom(6).hex().encode()
_count = itertools.count(1)


def _new_prefix() -> None:
    """Forked workers must not use the same prefix."""
    global _prefix
    _prefix = os.urandom(6).hex().encode()


os.register_at_fork(after_in_child=_new_prefix)


def new_request_id() -> bytes:
    """A random prefix per process and a counter: unique without a system call per request."""
    return b"req-%b-%x" % (_prefix, next(_count))


class Incoming:
    """Filled by the client's parser; complete when ``body`` is whole or ``problem`` is set."""

    __slots__ = (
        "_budget", "_form", "_held", "_json", "_scan", "body", "head", "headers", "keep_alive",
        "key", "length", "match", "method", "problem", "request_id", "target", "upload",
        "withheld",
    )  # fmt: skip

    def __init__(self, budget: BodyBudget = NO_BUDGET) -> None:
        self.method = b""
        self.target = b""
        self.headers: Headers = []
        self.head = NO_HEAD
        self.body = b""
        self._json: JsonBody | None = None  # of the body, once read
        self.length = 0  # announced; 0 = none or chunked
        self.keep_alive = True
        self.request_id = b""
        self.problem: Refused | None = None
        self.match: Match | None = None  # the route to an engine, if any
        self.upload: Upload | None = None  # in place of ``body``, for forms and long JSON
        self._form: ModelFinder | None = None
        self._scan: JsonFinder | None = None  # of a long JSON body
        self._budget = budget
        self._held = 0  # bytes taken of it
        self.key: KeyUse | None = None  # None: no keys configured, or none needed
        self.withheld = False  # keys are configured: engines must not get the credentials

    def __del__(self) -> None:
        self._budget.used -= self._held

    def drop_body(self) -> None:
        """Give back what was taken of the budget. A refusal's traceback may keep this object."""
        self.body = b""
        self.upload = None
        self._budget.used -= self._held
        self._held = 0

    def hold(self, size: int) -> None:
        """Take ``size`` bytes of the budget until this object is gone. Raises Refused."""
        budget = self._budget
        if budget.used + size > budget.long_limit and not budget.has_room(self._held, size):
            raise budget.exceeded()
        budget.used += size
        self._held += size

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]

    def head_bytes(self) -> int:
        """The head's size, without blanks around values."""
        values = sum(map(len, chain.from_iterable(self.headers)))
        return len(self.target) + values + 4 * len(self.headers)

    def read_head(self, version: str, reader: HeadReader) -> None:
        """Raises BadHead."""
        if not self.target or self.target.translate(None, _TARGET):
            raise BadHead("the request target contains a space, a control or a non-ASCII character")
        if self.target[:1] != b"/":
            self._become_origin_form()
        self.head, self.length = reader.read(self.headers, version)
        self.request_id = self.head.request_id or new_request_id()

    def _become_origin_form(self) -> None:
        """Who may do what, and where a request goes, is decided by its path. The host of an
        absolute target counts, and not the header's."""
        found = _ABSOLUTE.match(self.target)
        if found is None:
            return
        rest = self.target[found.end() :]
        self.target = rest if rest[:1] == b"/" else b"/" + rest
        for at, (name, _) in enumerate(self.headers):
            if name.lower() == b"host":
                self.headers[at] = (name, found[1])

    def header(self, name: bytes) -> bytes:
        """The first header of that (lower-case) name; b"" when absent."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    def find_route(self) -> None:
        """Set ``match`` if this goes to an engine, and ``target`` to the engine's own path."""
        if self.method == b"POST":  # the common case first: the engine's own path and no query
            match = routes.POSTS.get(self.target)
            if match is not None and match.path == self.target:
                self.match = match
                return
        path, mark, query = self.target.partition(b"?")
        self.match = match = routes.find(self.method, path)
        if match is not None and match.path != path:
            self.target = match.path + mark + query

    def target_is_readable(self) -> bool:
        """False: Sanic cannot parse the target and would close without a response, or would route
        it by another path than the one by which it was judged who may ask."""
        try:
            return bool(httptools.parse_url(self.target).path == self.path)
        except httptools.HttpParserInvalidURLError:
            return False

    def begin_form(self) -> None:
        """Raises Refused."""
        try:
            self._form = ModelFinder(boundary_of(self.header(b"content-type")))
        except FormError as error:
            raise _unreadable(error) from None
        self.upload = Upload()

    def begin_json(self) -> None:
        self._scan = JsonFinder()
        self.upload = Upload()

    def add_upload(self, data: bytes) -> str | None:
        """Append to the upload. Returns a form's model as soon as it is known. Raises Refused."""
        assert self.upload is not None, "begin_form or begin_json was called"
        try:
            self.upload.write(data)
            if self._scan is not None:
                self._scan.feed(data)
                return None  # a later key may name another
            assert self._form is not None, "an upload is a form or JSON"
            self._form.feed(data)
        except JsonError as error:
            raise _unreadable(error, "not JSON: ") from None
        except FormError as error:
            raise _unreadable(error) from None
        except OSError as error:
            cause = error.strerror or str(error)
            raise Refused(Reason.INTERNAL, f"cannot store the upload: {cause}") from None
        in_path = self.match.model if self.match is not None else None
        return in_path or self._form.model

    def json(self) -> JsonBody:
        """See ``JsonBody``; parsed once. Raises Refused."""
        if self._json is None:
            scan, named = self._scan, self.match is None or self.match.model is None
            self._json = (
                openai.read_body(self.body, named=named)
                if scan is None
                else self._scanned(scan, named)
            )
        return self._json

    @staticmethod
    def _scanned(scan: JsonFinder, named: bool) -> JsonBody:
        try:
            scan.close()
        except JsonError as error:
            raise _unreadable(error, "not JSON: ") from None
        if named and scan.model is None:
            raise openai.no_model(scan.wrong)
        return scan.model or "", scan.stream, scan.previous

    def model(self) -> str | None:
        """The name the client gave, from the complete body; None: see the response id of the path.
        Raises Refused."""
        match = self.match
        assert match is not None, "called for requests to engines only"
        if match.model is not None:
            return match.model
        if match.route.source is Source.JSON:
            return self.json()[0]
        if match.route.source is Source.RESPONSE_ID:
            return None
        name = self._form.model if self._form is not None else None
        if not name:
            raise openai.no_model("missing" if name is None else "empty")
        return name

    def wants_stream(self) -> bool:
        """Whether the body asks for an event stream."""
        assert self.match is not None, "called for requests to engines only"
        if self._form is not None:
            return self._form.stream
        if self.match.route.source is not Source.JSON:
            return False
        try:
            return self.json()[1]
        except Refused:
            return False  # the path names the model; the engine refuses the body

    def named_response(self) -> str | None:
        """The stored response that the path names or the body continues."""
        assert self.match is not None, "called for requests to engines only"
        if self.match.response_id is not None or self.match.route.source is not Source.JSON:
            return self.match.response_id
        try:
            return self.json()[2]
        except Refused:
            return None  # left to the engine to refuse

    def name_in_body(self) -> str | None:
        """The model's name in the body, which the one in the path overrides."""
        assert self.match is not None, "called for requests to engines only"
        if self._form is not None:
            return self._form.model
        if self.match.route.source is not Source.JSON:
            return None
        try:
            return self.json()[0] or None
        except Refused:
            return None  # left to the engine to refuse

    def replace_alias(self, alias: str, model: str) -> None:
        """Write the model's own name in place of an alias: engines know only their own."""
        assert self.match is not None, "called for requests to engines only"
        if self.match.model is not None and self.name_in_body() != alias:
            return  # the alias was in the path
        self._name_model(model)

    def write_adapter(self, adapter: str) -> None:
        """Write the adapter in the path into the body: an engine goes by that, and answers a body
        that names none with its own model. Raises Refused when it cannot be written."""
        assert self.match is not None, "called for requests to engines only"
        has_model = self.match.route.source in (Source.JSON, Source.FORM)
        if has_model and self.name_in_body() != adapter:
            self._name_model(adapter)

    def _name_model(self, model: str) -> None:
        try:
            if self.upload is None:
                self.body = openai.replace_model(self.body, model)
            elif self._scan is not None:
                self._scan.close()
                self.upload.replace(*self._scan.naming(model))
            elif self._form is not None:
                self.upload.replace(*self._form.naming(model))
        except JsonError as error:
            raise _unreadable(error, "not JSON: ") from None
        except FormError as error:
            raise _unreadable(error) from None

    @property
    def anthropic(self) -> bool:
        return self.match is not None and self.match.route.anthropic

    def engine_head(self) -> bytes:
        size = len(self.body) if self.upload is None else self.upload.size
        credentials = b"" if self.withheld else self.head.credentials
        return b"%b %b HTTP/1.1\r\n%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            self.method, self.target, self.head.forwarded, credentials, self.request_id, size,
        )  # fmt: skip

    def sanic_request(self, *, close: bool) -> bytes:
        """The complete request in the one canonical form that Sanic gets."""
        lines = b"%bx-request-id: %b\r\ncontent-length: %d\r\nconnection: %b\r\n" % (
            self.head.forwarded, self.request_id, len(self.body),
            b"close" if close or not self.keep_alive else b"keep-alive",
        )  # fmt: skip
        version = b"HTTP/1.0" if self.head.version_1_0 else b"HTTP/1.1"
        return b"%b %b %b\r\n%b\r\n%b" % (self.method, self.target, version, lines, self.body)


def _unreadable(error: FormError | JsonError, what: str = "") -> Refused:
    return Refused(Reason.BAD_REQUEST, f"cannot read the request body: {what}{error}")


def plain_head(parser: Any, target: bytes, headers: Headers) -> bytes:
    """The request's head without its Upgrade headers. An ambiguous head becomes one that every
    parser refuses."""
    version = parser.get_http_version().encode()
    kept = [name + b": " + value for name, value in headers if name.lower() not in UPGRADE_HEADERS]
    head = b"\r\n".join(
        [parser.get_method() + b" " + target + b" HTTP/" + version, *kept, b"", b""]
    )
    return head if head.count(b"\n") == head.count(b"\r") == len(kept) + 2 else b"\0\r\n\r\n"
