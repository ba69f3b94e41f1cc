"""OpenAI's API as far as the gateway must know it: where the model's name is, what lists look like.

Bodies go to the engine byte for byte; this module only reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from llmux.errors import Reason, Refused
from llmux.protocol import ModelInfo

_NAMED = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # unknown to typeshed


def model_of(body: bytes) -> str:
    """The ``model`` of a JSON body. The engine reads the body with the same parser (json.loads), so
    both see the same one when a key occurs twice: the last. Raises Refused."""
    try:
        parsed = _parse(body)
    except (ValueError, RecursionError) as error:
        raise Refused(
            Reason.BAD_REQUEST, f"cannot read the request body: not JSON: {error or 'too deep'}"
        ) from None
    if not isinstance(parsed, dict):
        raise Refused(
            Reason.BAD_REQUEST, "cannot read the request body: expected a JSON object with a model"
        )
    model = parsed.get("model")
    if not isinstance(model, str) or not model:
        what = "missing" if model is None else "not a string" if model != "" else "empty"
        raise no_model(what)
    return model


def _parse(body: bytes) -> Any:
    """json.loads, whose three layers above the C scanner cost as much as a short body itself."""
    if body[:1] == b"{" and body[1:2] != b"\0":  # UTF-8, as json.detect_encoding has it
        try:
            text = body.decode("utf-8", "surrogatepass")
            parsed, end = _scan(text, 0)
            if end == len(text) or not text[end:].strip(" \t\n\r"):
                return parsed
        except (StopIteration, ValueError, RecursionError):
            pass
    return json.loads(body)  # raises the error in its own words


def renamed(body: bytes, model: str) -> bytes:
    """The body with another ``model``, and otherwise as it is: byte for byte, unless there are more
    keys of that name in it."""
    name = json.dumps(model).encode()
    found = list(_NAMED.finditer(body))
    if len(found) == 1:
        written = body[: found[0].start(1)] + name + body[found[0].end(1) :]
        try:
            if model_of(written) == model:
                return written
        except Refused:
            pass
    parsed: dict[str, Any] = json.loads(body)
    return json.dumps(parsed | {"model": model}).encode()


def no_model(what: str) -> Refused:
    return Refused(
        Reason.BAD_REQUEST,
        f'cannot tell which model is meant: "model" is {what}',
        hint="GET /v1/models lists the models",
        param="model",
    )


def unknown_model(name: str) -> Refused:
    return Refused(
        Reason.UNKNOWN_MODEL,
        f'the model "{name[:200]}" does not exist',
        hint="GET /v1/models lists the models",
        param="model",
    )


def names_of(infos: Iterable[ModelInfo]) -> dict[str, str]:
    """Every name and alias → the model; a model's own name wins over another's alias."""
    known = list(infos)
    names = {alias: info.name for info in known for alias in info.aliases}
    return names | {info.name: info.name for info in known}


def model_object(info: ModelInfo, called: str | None = None) -> dict[str, Any]:
    """One entry of /v1/models; ``state`` and ``aliases`` are ours, the rest is what OpenAI and vLLM
    send. ``called``: the alias that was asked for."""
    entry: dict[str, Any] = {
        "id": called or info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "llmux",
        "root": info.name,
        "state": info.state,
        "aliases": info.aliases,
    }
    if info.max_model_len is not None:
        entry["max_model_len"] = info.max_model_len
    return entry


def model_list(infos: Iterable[ModelInfo]) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(info) for info in infos]}
