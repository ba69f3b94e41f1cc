"""What the fuzzer's bytes mean, by a reader of our own that knows one meaning or none (RFC 9112).

Shares no code with the gateway. Where two readers could differ (two lengths, a bare line feed in
chunking, a folded header) it stops: from there on nothing may reach an engine.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

Headers = list[tuple[bytes, bytes]]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST = re.compile(rb"(" + _TOKEN + rb") +([\x21-\x7e]+) +HTTP/1\.([01])")
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [^\r\n\0]*")
_HEADER = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([^\r\n\0]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[^\r\n\0]*)?)[ \t]*")

# about one connection (RFC 9110 7.6.1), about the client, or written anew by the gateway
NOT_FORWARDED = frozenset(
    b"connection content-length expect keep-alive origin proxy-authorization proxy-connection te"
    b" trailer transfer-encoding upgrade x-request-id x-request-timeout x-stainless-timeout"
    b" authorization x-api-key".split()
)
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})


class UnclearError(Exception):
    """No request, or one that could be read in two ways."""


class IncompleteError(Exception):
    """More bytes are needed."""


@dataclass
class Message:
    """A request or a response; ``start`` are the parts of its first line."""

    start: tuple[bytes, ...]
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    ends_connection: bool = False
    complete: bool = True

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    @property
    def status(self) -> int:
        return int(self.start[0])


class Cursor:
    """``data`` read from ``at`` on."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def line(self, *, bare: bool) -> bytes:
        """Up to the next CRLF, or with ``bare`` a line feed alone (RFC 9112 2.2 permits both)."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise IncompleteError
        line = self.data[self.at : end]
        if not line.endswith(b"\r") and not bare:
            raise UnclearError("a bare line feed")
        self.at = end + 1
        return line.removesuffix(b"\r")

    def skip(self, these: bytes) -> None:
        while self.data[self.at : self.at + 1] and self.data[self.at] in these:
            self.at += 1

    def take(self, count: int) -> bytes:
        if len(self.data) - self.at < count:
            raise IncompleteError
        self.at += count
        return self.data[self.at - count : self.at]

    def rest(self) -> bytes:
        return self.data[self.at :]

    def headers(self) -> Headers:
        found = []
        while line := self.line(bare=True):
            match = _HEADER.fullmatch(line)
            if match is None:
                raise UnclearError(f"not a header: {line[:80]!r}")
            found.append((match[1], match[2].rstrip(b" \t")))
        return found

    def chunks(self) -> bytes:
        body = b""
        while True:
            match = _CHUNK.fullmatch(self.line(bare=False))
            if match is None:
                raise UnclearError("not a chunk")
            size = int(match[1], 16)
            if size == 0:
                self.headers()  # trailers
                return body
            body += self.take(size)
            if self.take(2) != b"\r\n":
                raise UnclearError("a chunk longer than it said")


def read_requests(data: bytes) -> tuple[list[Message], str]:
    """All requests with one meaning, in order, and why reading ended: "", "incomplete", "close", or
    what is unclear."""
    cursor = Cursor(data)
    requests: list[Message] = []
    while True:
        begin = cursor.at
        try:
            request = _request(cursor)
        except IncompleteError:
            return requests, "incomplete" if data[begin:].strip(b"\r\n") else ""
        except UnclearError as error:
            return requests, str(error)
        requests.append(request)
        if request.ends_connection:
            return requests, "close"


def _request(cursor: Cursor) -> Message:
    cursor.skip(b"\r\n")  # empty lines (RFC 9112 2.2); llhttp takes any of their bytes for one
    line = cursor.line(bare=True)
    match = _REQUEST.fullmatch(line)
    if match is None:
        raise UnclearError(f"not a request line: {line[:80]!r}")
    message = Message((match[1], match[2]), cursor.headers())
    old = match[3] == b"0"
    lengths, codings = message.all(b"content-length"), message.all(b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise UnclearError("more than one length")
    if codings:
        if codings[0].lower() != b"chunked" or old:
            raise UnclearError("a transfer-encoding that is not chunked")
        message.body = cursor.chunks()
    elif lengths:
        if not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
            raise UnclearError("a length that is no number")
        message.body = cursor.take(int(lengths[0]))
    words = _listed(message.all(b"connection"))
    message.ends_connection = b"close" in words or (old and b"keep-alive" not in words)
    return message


def _listed(values: list[bytes]) -> set[bytes]:
    return {word.strip(b" \t").lower() for value in values for word in value.split(b",")}


def read_responses(data: bytes, requests: list[Message]) -> list[Message]:
    """The final responses in ``data``, which is all that one connection brought; the last may be
    incomplete. ``requests``: what they answer. Raises UnclearError for what is no response."""
    cursor = Cursor(data)
    responses: list[Message] = []
    while cursor.rest():
        try:
            match = _STATUS.fullmatch(cursor.line(bare=False))
            if match is None:
                raise UnclearError(f"no response at {cursor.at} of {cursor.data!r:.4000}")
            message = Message((match[1],), cursor.headers())
        except IncompleteError:
            break
        if message.status < 200:
            continue
        at = len(responses)
        asked = requests[at].start[0] if at < len(requests) else b""
        responses.append(message)
        try:
            _response_body(cursor, message, asked)
        except IncompleteError:
            message.complete = False
            break
    return responses


def _response_body(cursor: Cursor, message: Message, asked: bytes) -> None:
    lengths, codings = message.all(b"content-length"), message.all(b"transfer-encoding")
    message.ends_connection = b"close" in _listed(message.all(b"connection"))
    if len(lengths) + len(codings) > 1:
        raise UnclearError("a response with two lengths")
    if asked == b"HEAD" or message.status in (204, 304):
        return
    if codings:
        message.body = cursor.chunks()
    elif lengths:
        message.body = cursor.take(int(lengths[0]))
    else:
        message.body = cursor.take(len(cursor.rest()))
        message.ends_connection = True


# ---- which of them may reach an engine, and as what ---------------------------------------------


def _paths() -> dict[bytes, bytes]:
    """What a client may POST → what the engine is asked. Written down here a second time."""
    found = {}
    for path in (
        b"chat/completions completions embeddings rerank score audio/speech audio/transcriptions"
        b" audio/translations messages messages/count_tokens responses".split()
    ):
        for prefix in (b"/v1/", b"/v/", b"/"):
            found[prefix + path] = b"/v1/" + path
    for path in b"tokenize detokenize classify pooling".split():
        for prefix in (b"/v1/", b"/v/", b"/"):
            found[prefix + path] = b"/" + path
    for path in b"/v2/rerank /v1/reranking /v/reranking /reranking".split():
        found[path] = b"/v1/rerank"
    return found


POSTS = _paths()
GETS = frozenset(b"/v1/models /health /version".split())
_BY_ID = re.compile(rb"/(?:v1/|v/)?(responses/[A-Za-z0-9_-]{1,200}(/cancel)?)")


@dataclass(frozen=True)
class Arrival:
    """A request as an engine must see it."""

    line: bytes
    headers: tuple[tuple[bytes, bytes], ...]  # sorted, without the two that the gateway writes
    body: bytes  # or its meaning, see ``meaning_of``


def arrival_of(request: Message, own_name: bytes, *, secret: bytes | None) -> Arrival | None:
    """What this request is to the engine of the model ``own_name``, whose alias is org/<name>;
    None: it has no business there. With ``secret`` the gateway asks for that key."""
    method, target = request.start
    path, mark, query = target.partition(b"?")
    model: bytes | None = None
    body = request.body
    if path.startswith(b"/upstream/"):
        named, slash, rest = path.removeprefix(b"/upstream/").partition(b"/")
        model, path = unquote_to_bytes(named), slash + rest
        alias = b"org/" + own_name
        if path in POSTS and model in (own_name, alias) and _model_of(request) == alias:
            body = _called(request, alias, own_name)
    own = _engine_path(method, path, upstream=model is not None)
    if own is None:
        return None
    if secret is not None and secret not in _keys(request):
        return None
    if model is None and not _BY_ID.fullmatch(path):
        model = _model_of(request)
        if model == b"org/" + own_name:
            model, body = own_name, _called(request, model, own_name)
        if model is None:
            return None
    if model not in (None, own_name, b"org/" + own_name):
        return None
    dropped = _listed(request.all(b"connection")) - {b"close", b"keep-alive"}
    kept = CREDENTIALS if secret is None else frozenset()
    headers = [
        (name, value)
        for name, value in request.headers
        if (lowered := name.lower()) not in NOT_FORWARDED - kept
        and (lowered not in dropped or lowered in kept)
    ]
    line = method + b" " + own + mark + query + b" HTTP/1.1"
    return Arrival(line, tuple(sorted(headers)), body)


def _called(request: Message, alias: bytes, name: bytes) -> bytes:
    """The body with the model's own name in place of the alias, nothing else changed; its meaning
    where it names models more than once, and may be written anew."""
    body = request.body
    if _is_form(request):
        return body.replace(b"\r\n\r\n%b\r\n" % alias, b"\r\n\r\n%b\r\n" % name, 1)
    if body.count(b'"model"') == body.count(b'"%b"' % alias) == 1:
        return body.replace(b'"%b"' % alias, b'"%b"' % name)
    return meaning_of(json.dumps(json.loads(body) | {"model": name.decode()}).encode())


def meaning_of(body: bytes) -> bytes:
    """What a JSON body says, however it is written."""
    try:
        return b"meaning " + json.dumps(json.loads(body), sort_keys=True).encode()
    except (ValueError, RecursionError):
        return body


def _is_form(request: Message) -> bool:
    kinds = request.all(b"content-type")
    return any(value.lower().startswith(b"multipart/") for value in kinds)


def _keys(request: Message) -> set[bytes]:
    parts = [value.partition(b" ") for value in request.all(b"authorization")]
    bearers = {token.strip() for scheme, _, token in parts if scheme.lower() == b"bearer"}
    return bearers | set(request.all(b"x-api-key"))


def _engine_path(method: bytes, path: bytes, *, upstream: bool) -> bytes | None:
    if method == b"GET" and upstream and path in GETS:
        return path
    if method == b"POST" and path in POSTS:
        return POSTS[path]
    found = _BY_ID.fullmatch(path)
    if found is not None and method == (b"POST" if found[2] else b"GET"):
        return b"/v1/" + found[1]
    return None


def _model_of(request: Message) -> bytes | None:
    if _is_form(request):  # which part is whose is the engine's affair, that has but one model
        found = re.search(rb"\r\n\r\n((?:org/)?[a-z]+-model)\r\n--", request.body)
        return found[1] if found else None
    try:
        model = json.loads(request.body)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return model.encode("utf-8", "surrogatepass") if isinstance(model, str) else None
