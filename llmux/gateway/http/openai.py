"""The parts of OpenAI's API that the gateway reads or writes: a body's model, lists of models.

Bodies go to the engine byte for byte, except for a model's name that replaces an alias.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from llmux.errors import Reason, Refused
from llmux.gateway.http.json_finder import JsonError, JsonFinder, is_true
from llmux.protocol import ModelInfo

_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # unknown to typeshed


# (model, the response will be an event stream, id of the stored response that it continues); no
# model: "", where the path names it
JsonBody = tuple[str, bool, str | None]


def read_body(body: bytes, *, named: bool = True) -> JsonBody:
    """``named``: it must name a model. Raises Refused."""
    parsed = _read_object(body)
    model = parsed.get("model")
    if not isinstance(model, str) or not model:
        what = "missing" if model is None else "not a string" if model != "" else "empty"
        if named:
            raise no_model(what)
        model = ""
    previous = parsed.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        previous = None
    return model, is_true(parsed.get("stream")), previous


def _read_object(body: bytes) -> dict[str, Any]:
    """Raises Refused.

    The engine reads the body with the same parser (json.loads), so both see the same value of a key
    that occurs twice: the last.
    """
    try:
        parsed = _parse(body)
    except (ValueError, RecursionError) as error:
        raise Refused(
            Reason.BAD_REQUEST, f"cannot read the request body: not JSON: {error}"
        ) from None
    if not isinstance(parsed, dict):
        raise Refused(
            Reason.BAD_REQUEST, "cannot read the request body: expected a JSON object with a model"
        )
    return parsed


def _parse(body: bytes) -> Any:
    """As json.loads, whose layers above the C scanner cost as much as parsing a short body."""
    if body[:1] == b"{" and body[1:2] != b"\0":  # UTF-8, as json.detect_encoding decides
        try:
            text = body.decode("utf-8", "surrogatepass")
            parsed, end = _scan(text, 0)
            if end == len(text) or not text[end:].strip(" \t\n\r"):
                return parsed
        except (StopIteration, ValueError):
            pass
    return json.loads(body)  # raises with json's own message


def replace_model(body: bytes, model: str) -> bytes:
    """The body with ``model`` for its own or for none, and all other bytes unchanged. Raises
    Refused."""
    finder = JsonFinder()
    try:
        finder.feed(body)
        finder.close()
    except JsonError:  # also what is not UTF-8, which json.loads takes
        return json.dumps(_read_object(body) | {"model": model}).encode()
    start, end, naming = finder.naming(model)
    return body[:start] + naming + body[end:]


def no_model(what: str) -> Refused:
    return Refused(
        Reason.BAD_REQUEST,
        f'cannot determine the model: "model" is {what}',
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
    """Name, alias or adapter → model; a model's own name overrides another's alias."""
    known = list(infos)
    names = {alias: info.name for info in known for alias in (*info.aliases, *info.adapters)}
    return names | {info.name: info.name for info in known}


def model_object(info: ModelInfo, called: str | None = None) -> dict[str, Any]:
    """One entry of /v1/models. ``state`` and ``aliases`` are llmux's additions to the fields of
    OpenAI and vLLM. ``called``: the alias that the client used."""
    entry: dict[str, Any] = {
        "id": called or info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "llmux",
        "root": info.name,
        "state": info.state,
        "aliases": info.aliases,
    }
    if called in info.adapters:
        entry |= {"parent": info.name, "aliases": []}
    if info.stale:
        entry["stale"] = True
    if info.max_model_len is not None:
        entry["max_model_len"] = info.max_model_len
    return entry


def model_list(infos: Iterable[ModelInfo]) -> dict[str, Any]:
    entries = []
    for info in infos:
        entries.append(model_object(info))
        entries += (model_object(info, called=adapter) for adapter in info.adapters)
    return {"object": "list", "data": entries}
