"""Small values in notes, image recipes and requests, read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmux.config.schema import Eviction, Process, Weights
from llmux.ports import Canary
from llmux.protocol import Address


def parse_eviction(text: str) -> Eviction:
    """``weights+process``; ValueError names what is wrong."""
    weights, _, process = text.partition("+")
    if weights not in list(Weights) or process not in list(Process):
        raise ValueError(f'expected {"|".join(Weights)}+{"|".join(Process)}, got "{text}"')
    return Eviction(Weights(weights), Process(process))


def address_from(document: Mapping[str, Any]) -> Address | None:
    uds, port = document.get("uds"), document.get("port")
    if isinstance(uds, str):
        return Address(uds=uds)
    return Address(port=port) if isinstance(port, int) else None


def canary_from(document: Mapping[str, Any]) -> Canary | None:
    match document.get("canary"):
        case [str(text), [*logprobs]]:
            return Canary(text, tuple(float(p) for p in logprobs))
        case _:
            return None
