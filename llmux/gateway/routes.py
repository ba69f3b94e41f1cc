"""What a client may ask of an engine: the one list. What is not in it has no way to an engine.

Paths are compared byte for byte: nothing is decoded, folded or normalised first, so no spelling of
another path can pass for one of these. What the engine is asked for is the entry's own path.
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
    """Where the model's name is."""

    JSON = auto()  # "model" of the body
    FORM = auto()  # the part "model" of a multipart form
    RESPONSE_ID = auto()  # whoever gave the answer of this id
    PATH = auto()  # /upstream/<model>/…


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` is the engine's. ``anthropic``: errors in Anthropic's shape. ``keeps``: the engine
    keeps the answer under its id, and the gateway remembers who that was."""

    path: bytes
    source: Source = Source.JSON
    anthropic: bool = False
    keeps: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """A route with what the path itself says: a response's id, or the model, which then counts."""

    route: Route
    path: bytes
    model: str | None = None
    response_id: str | None = None


# the engine's path → what clients may call it besides
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
_RESPONSES: Final = Route(b"/v1/responses", keeps=True)


def _posts() -> Iterator[tuple[bytes, Route]]:
    for path, others in _JSON.items():
        yield from ((name, Route(path)) for name in (path, *others))
    for path, others in _ANTHROPIC.items():
        yield from ((name, Route(path, anthropic=True)) for name in (path, *others))
    for path, others in _FORMS.items():
        yield from ((name, Route(path, Source.FORM)) for name in (path, *others))
    for name in (_RESPONSES.path, b"/responses", b"/v/responses"):
        yield name, _RESPONSES


POSTS: Final[Mapping[bytes, Match]] = MappingProxyType(
    {name: Match(route, route.path) for name, route in _posts()}
)

# What may be read of one engine by name, below /upstream/<model>. Reading wakes the model.
UPSTREAM_GETS: Final = frozenset({b"/v1/models", b"/health", b"/version"})
UPSTREAM: Final = b"/upstream/"

_BY_ID: Final = re.compile(rb"/(?:v1/|v/)?responses/([A-Za-z0-9_-]{1,200})(/cancel)?")
_MODEL_IN_PATH: Final = re.compile(rb"/upstream/([^/]{1,600})(/.*)", re.DOTALL)


def find(method: bytes, path: bytes) -> Match | None:
    """The way to an engine for this request, or None."""
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
    found = _MODEL_IN_PATH.fullmatch(path)
    if found is None:
        return None
    try:
        model = unquote_to_bytes(found[1]).decode()
    except UnicodeDecodeError:
        return None
    rest = found[2]
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
    """The methods that would find a way; none when the path has none at all."""
    return tuple(m for m in ("GET", "POST") if find(m.encode(), path) is not None)


def speaks_anthropic(path: bytes) -> bool:
    """Whether errors about this path are told in Anthropic's shape, whatever the method."""
    match = find(b"POST", path)
    return match is not None and match.route.anthropic
