"""Metric families to the bytes of a scrape, in the format that the Accept header asks for.

prometheus_client's encoders take 2 to 10 µs a line with the interpreter's lock held, and fifty
models have ten thousand lines. A thread would not help the relay, which needs the same lock; so a
page is encoded in portions, and the event loop runs between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

_END_OF_OPENMETRICS: Final = b"# EOF\n"


@dataclass(frozen=True, slots=True)
class Format:
    encode: Callable[[Any], bytes]  # takes what has a ``collect``
    content_type: str
    end: bytes = b""


TEXT: Final = Format(*choose_encoder(""))
# All our names are valid without escaping. Some versions of prometheus_client, asked for another
# scheme, write vllm:x as vllm_x in samples and not in their headers.
OPENMETRICS: Final = Format(
    *choose_encoder("application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"),
    end=_END_OF_OPENMETRICS,
)


def negotiate(accept: str) -> Format:
    try:
        _, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it compares a version that is no number with numbers
        return TEXT
    return OPENMETRICS if content_type.startswith("application/openmetrics-text") else TEXT


class _Portion:
    """A registry of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


async def encode(families: Iterable[Metric], form: Format) -> bytes:
    """Families of the same name that follow each other become one."""
    parts: list[bytes] = []
    last = ""
    for family in families:
        text = form.encode(_Portion(family)).removesuffix(form.end)
        parts.append(_without_header(text) if family.name == last else text)
        last = family.name
        await asyncio.sleep(0)
    return b"".join([*parts, form.end])


def _without_header(text: bytes) -> bytes:
    start = 0
    while text.startswith(b"# ", start):
        start = text.index(b"\n", start) + 1
    return text[start:]
