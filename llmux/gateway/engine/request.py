"""A request for an engine, as the pool gets it: one value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import NamedTuple

from llmux.gateway.http.multipart import Upload


class Delivery(StrEnum):
    """How the sink gets the response's body. Strings, whose hash takes no call."""

    VERBATIM = auto()  # the engine's bytes, chunk headers included
    UNCHUNKED = auto()  # the body alone, for HTTP/1.0 clients
    RENAMED = auto()  # the model's name replaced, in chunks of our own


class Rename(NamedTuple):
    """Replace the engine's ``name`` of the model by ``alias``. ``chunked``: write chunks."""

    name: str
    alias: str
    chunked: bool


@dataclass(slots=True)  # made in half the time that a named tuple takes
class EngineRequest:
    """``head`` and ``body`` as they are sent; they may be sent twice. ``rename`` is set exactly for
    ``Delivery.RENAMED``."""

    head: bytes
    body: bytes | Upload
    delivery: Delivery = Delivery.VERBATIM
    rename: Rename | None = None
