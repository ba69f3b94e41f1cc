"""The inference routes: the complete list of requests that reach an engine.

Paths are compared byte for byte: nothing is decoded, folded or normalised first, so no spelling of
another path can pass for one of these. The engine gets the entry's own path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Final
from urllib.parse import unquote_to_bytes


class Source(Enum):
    """Where a request names its model."""

    JSON = auto()  # "model" of the body
    FORM = auto()  # the part "model" of a multipart form
    RESPONSE_ID = auto()  # the model that owns the stored response
    PATH = auto()  # /upstream/<model>/…


JSON: Final = Source.JSON  # for the path of every request: a member's lookup costs six of these


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` is the engine's. ``anthropic``: errors in Anthropic's shape. ``keeps``: the engine
    stores the response under its id, and the gateway remembers the model. ``streams``: "stream" in
    the body may make an event stream of the answer; where it is False, engines ignore that key."""

    path: bytes
    source: Source = Source.JSON
    anthropic: bool = False
    keeps: bool = False
    streams: bool = False

    @property
    def chat(self) -> bool:
        """Its streams are of chat completion chunks."""
        return self.path == b"/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Match:
    """A route and the path's values: a response id, or the model (overrides the body's)."""

    route: Route
    path: bytes
    model: str | None = None
    response_id: str | None = None


# the engine's path → other paths for clients
_JSON: Final[Mapping[bytes, tuple[bytes, ...]]] = {
    b"/v1/chat/completions": (b"/chat/completions", b"/v/chat/completions"),
    b"/v1/completions": (b"/completions", b"/v/completions"),
    b"/v1/embeddings": (b"/embeddings", b"/v/embeddings"),
    b"/v1/rerank": (
        b"/rerank", b"/v/rerank", b"/v1/reranking", b"/reranking", b"/v/reranking", b"/v2/rerank",
    ),
    b"/v1/score": (b"/score", b"/v/score"),
    b"/tokenize": (b"/v1/tokenize", b"/v/tokenize"),
    b"/detokenize": (b"/v1/detokenize", b"/v/detokenize"),
    b"/classify": (b"/v1/classify", b"/v/classify"),
    b"/pooling": (b"/v1/pooling", b"/v/pooling"),
    b"/v1/audio/speech": (b"/audio/speech", b"/v/audio/speech"),
}  # fmt: skip
_ANTHROPIC: Final[Mapping[bytes, tuple[bytes, ...]]] = {
    b"/v1/messages": (b"/messages", b"/v/messages"),
    b"/v1/messages/count_tokens": (b"/messages/count_tokens", b"/v/messages/count_tokens"),
}
_FORMS: Final[Mapping[bytes, tuple[bytes, ...]]] = {
    b"/v1/audio/transcriptions": (b"/audio/transcriptions", b"/v/audio/transcriptions"),
    b"/v1/audio/translations": (b"/audio/translations", b"/v/audio/translations"),
}
_RESPONSES: Final = Route(b"/v1/responses", keeps=True, streams=True)
# Of vLLM 0.32; /v1/audio/speech, of its extensions, streams the sound itself.
_STREAMS: Final = frozenset((b"/v1/chat/completions", b"/v1/completions", b"/v1/messages", *_FORMS))


def _posts() -> Iterator[tuple[bytes, Route]]:
    for source, anthropic, table in (
        (Source.JSON, False, _JSON),
        (Source.JSON, True, _ANTHROPIC),
        (Source.FORM, False, _FORMS),
    ):
        for path, others in table.items():
            route = Route(path, source, anthropic=anthropic, streams=path in _STREAMS)
            yield from ((name, route) for name in (path, *others))
    for name in (_RESPONSES.path, b"/responses", b"/v/responses"):
        yield name, _RESPONSES


POSTS: Final[Mapping[bytes, Match]] = MappingProxyType(
    {name: Match(route, route.path) for name, route in _posts()}
)

# GET routes below /upstream/<model>. Using one wakes the model.
UPSTREAM_GETS: Final = frozenset({b"/v1/models", b"/health", b"/version"})
UPSTREAM: Final = b"/upstream/"

_BY_ID: Final = re.compile(rb"/(?:v1/|v/)?responses/([A-Za-z0-9_-]{1,200})(/cancel)?")
# Longer than any name with each byte percent-encoded.
_LONGEST_NAME: Final = 600


def find(method: bytes, path: bytes) -> Match | None:
    """The route of this request to an engine, or None."""
    if method == b"POST" and (match := POSTS.get(path)) is not None:
        return match
    if path.startswith(UPSTREAM):
        return _upstream(method, path)
    return _by_id(method, path)


def _by_id(method: bytes, path: bytes) -> Match | None:
    found = _BY_ID.fullmatch(path)
    if found is None or method != (b"POST" if found[2] else b"GET"):
        return None
    own = b"/v1/responses/" + found[1] + (found[2] or b"")
    return Match(Route(own, Source.RESPONSE_ID), own, response_id=found[1].decode())


def _upstream(method: bytes, path: bytes) -> Match | None:
    """A name with slashes may be written as it is: it ends where a route begins, at the first such
    place. A name that has a route's path inside is written with %2F."""
    end = path.find(b"/", len(UPSTREAM) + 1)
    while 0 < end <= len(UPSTREAM) + _LONGEST_NAME:
        try:
            model = unquote_to_bytes(path[len(UPSTREAM) : end]).decode()
        except UnicodeDecodeError:
            return None
        if (found := _below_model(method, path[end:], model)) is not None:
            return found
        end = path.find(b"/", end + 1)
    return None


def _below_model(method: bytes, rest: bytes, model: str) -> Match | None:
    if method == b"GET" and rest in UPSTREAM_GETS:
        return Match(Route(rest, Source.PATH), rest, model)
    inner = POSTS.get(rest) if method == b"POST" else None
    if inner is not None:
        return replace(inner, model=model)
    by_id = _by_id(method, rest)
    if by_id is not None:
        return replace(by_id, model=model)
    return None


def methods_of(path: bytes) -> tuple[str, ...]:
    """The methods that have a route to an engine for this path."""
    return tuple(m for m in ("GET", "POST") if find(m.encode(), path) is not None)


def speaks_anthropic(path: bytes) -> bool:
    """Whether errors for this path have Anthropic's shape, for any method."""
    match = find(b"POST", path)
    return match is not None and match.route.anthropic
