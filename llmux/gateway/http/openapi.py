"""The OpenAPI description of the gateway, served at /openapi.json.

Bodies of inference requests are described only as far as the gateway reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from llmux import __version__
from llmux.gateway.http import routes
from llmux.gateway.http.routes import Source

JSON = dict[str, Any]

_TEXTS: Final[Mapping[int, str]] = {
    400: "The request is invalid",
    401: "An API key is required, or the one given is not valid",
    403: "This key does not permit the request",
    404: "There is no such model, response or path",
    409: "Such an operation is running already",
    413: "The body is larger than gateway.max_body_bytes",
    415: "The body has a content-encoding",
    429: "A limit is reached; Retry-After says when to retry",
    500: "Internal error: see the journal",
    502: "The engine failed; the request was repeated where that was safe",
    503: "The model is not available now; Retry-After says when to retry",
    504: "The model could not be made ready in time",
}
_MODEL: Final[JSON] = {"type": "string", "minLength": 1, "description": "A model or an alias"}
_EVICTION: Final[JSON] = {
    "oneOf": [
        {"type": "string", "examples": ["offload+keep_running"]},
        {
            "type": "object",
            "required": ["weights", "process"],
            "properties": {
                "weights": {"enum": ["retain", "offload", "discard"]},
                "process": {
                    "enum": ["keep_running", "freeze", "cuda_suspend", "checkpoint", "stop"]
                },
            },
        },
    ]
}


def _object(properties: JSON, *required: str) -> JSON:
    return {"type": "object", "properties": properties, "required": list(required)}


def _body(kind: str, schema: JSON) -> JSON:
    return {"required": True, "content": {kind: {"schema": schema}}}


def _query(name: str, schema: JSON) -> JSON:
    return {"name": name, "in": "query", "schema": schema}


def _answers(*errors: int, kind: str = "application/json", shape: str = "Error") -> JSON:
    answers: JSON = {"200": {"description": "Done", "content": {kind: {"schema": {}}}}}
    error = {"schema": {"$ref": f"#/components/schemas/{shape}"}}
    for status in sorted({400, 401, 403, *errors}):
        answers[str(status)] = {
            "description": _TEXTS[status],
            "content": {"application/json": error},
        }
    return answers


def _operation(summary: str, answers: JSON, *parameters: JSON, body: JSON | None = None) -> JSON:
    operation: JSON = {"summary": summary, "responses": answers}
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        operation["requestBody"] = body
    return operation


def _path_parameter(name: str) -> JSON:
    schema = {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9._-]+$"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


_INFERENCE_ERRORS: Final = (404, 413, 415, 429, 500, 502, 503, 504)


def _inference() -> JSON:
    paths: JSON = {}
    for path, match in routes.POSTS.items():
        route = match.route
        named = _object({"model": _MODEL}, "model")
        kind = "application/json"
        if route.source is Source.FORM:
            kind = "multipart/form-data"
            named = _object({"model": _MODEL, "file": {"type": "string", "format": "binary"}},
                            "model")  # fmt: skip
        answers = _answers(
            *_INFERENCE_ERRORS, shape="AnthropicError" if route.anthropic else "Error"
        )
        summary = f"Passed on to the model's engine as {route.path.decode()}"
        paths[path.decode()] = {"post": _operation(summary, answers, body=_body(kind, named))}
    one = _path_parameter("response_id")
    for prefix in ("/v1/responses", "/responses", "/v/responses"):
        answers = _answers(*_INFERENCE_ERRORS)
        paths[f"{prefix}/{{response_id}}"] = {"get": _operation("A stored response", answers, one)}
        paths[f"{prefix}/{{response_id}}/cancel"] = {
            "post": _operation("Cancel a response in the background", answers, one)
        }
    return paths


def _control() -> JSON:
    model = _body("application/json", _object({"model": _MODEL}, "model"))
    modes = _body("application/json", _object({"mode": {"enum": ["auto", "manual"]}}, "mode"))
    eviction = {"model": _MODEL, "eviction": _EVICTION}
    slow = _answers(404, 409, 413, 500, 503, 504)
    quick = _answers(404, 413, 500, 503)
    return {
        "/control/status": {"get": _operation("Everything about all models", quick)},
        "/control/mode": {"post": _operation("Automatic or manual", quick, body=modes)},
        "/control/pin": {"post": _operation("Keep one model resident", slow, body=model)},
        "/control/unpin": {"post": _operation("Back to automatic", quick)},
        "/control/switch": {"post": _operation("Make a model resident", slow, body=model)},
        "/control/wake": {"post": _operation("Make a model resident", slow, body=model)},
        "/control/sleep": {
            "post": _operation(
                "Park a model", slow, body=_body("application/json", _object(eviction, "model"))
            )
        },
        "/control/eviction": {
            "get": _operation("How models are parked", quick),
            "post": _operation(
                "Change how a model is parked",
                quick,
                body=_body("application/json", _object(eviction, "model", "eviction")),
            ),
        },
        "/control/restart": {
            "post": _operation(
                "Stop engines after a drain and start those that served",
                slow,
                body=_body(
                    "application/json",
                    _object({"models": {"type": "array", "items": _MODEL}}, "models"),
                ),
            )
        },
        "/control/cancel": {
            "post": _operation(
                "Cancel orders under way",
                quick,
                body=_body(
                    "application/json",
                    _object({"orders": {"type": "array", "items": {"type": "integer"}}}, "orders"),
                ),
            )
        },
        "/control/checkpoint": {
            "post": _operation("Make a model's image on disk", slow, body=model)
        },
        "/running": {"get": _operation("Models whose engine has processes", quick)},
        "/unload": {
            "get": _operation("Stop models", slow, _query("model", _MODEL)),
            "post": _operation("Stop models", slow, _query("model", _MODEL)),
        },
    }


def _observation() -> JSON:
    plain = "text/plain; charset=utf-8"
    lines = _query("lines", {"type": "integer", "minimum": 1, "maximum": 10_000})
    model = _path_parameter("model")
    plain_answers = _answers(404, 500, 503, kind=plain)
    return {
        "/metrics": {"get": _operation("Metrics for Prometheus", _answers(500, 503, kind=plain))},
        "/logs": {
            "get": _operation("Output of an engine", plain_answers, _query("model", _MODEL), lines)
        },
        "/logs/{model}": {"get": _operation("Output of an engine", plain_answers, model, lines)},
        "/logs/stream/{model}": {
            "get": _operation("Output as it is written", plain_answers, model)
        },
        "/events": {
            "get": _operation(
                "Every transition as it happens", _answers(500, 503, kind="text/event-stream")
            )
        },
        "/ui/feed": {
            "get": _operation(
                "What the page at /ui/ shows, as it changes",
                _answers(503, kind="text/event-stream"),
            )
        },
        "/ui/history": {"get": _operation("Events of the last hour", _answers(503))},
        "/health": {"get": _operation("The gateway is alive", _answers())},
        "/health/live": {"get": _operation("The gateway is alive", _answers())},
        "/health/ready": {"get": _operation("The gateway is ready", _answers(503))},
        "/health/weights": {"get": _operation("How well each model is served", _answers())},
        "/openapi.json": {"get": _operation("This description", _answers())},
        "/v1/models": {"get": _operation("All models with their state", _answers())},
        "/models": {"get": _operation("All models with their state", _answers())},
        "/v1/models/{model}": {"get": _operation("One model", _answers(404), model)},
    }


def _errors() -> JSON:
    text: JSON = {"type": "string"}
    nullable: JSON = {"type": ["string", "null"]}
    openai = {"message": text, "type": text, "param": nullable, "code": {}}
    anthropic = {"type": text, "message": text}
    return {
        "Error": _object({"error": _object(openai, *openai)}, "error"),
        "AnthropicError": _object(
            {"type": {"const": "error"}, "error": _object(anthropic, *anthropic)}, "type", "error"
        ),
    }


@cache
def document() -> JSON:
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmux", "version": __version__},
        "paths": {**_observation(), **_control(), **_inference()},
        "components": {
            "schemas": _errors(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_PARAMETER: Final = re.compile(r"\\\{([a-z_]+)\\\}")


def _any_value(parameter: re.Match[str]) -> str:
    return ".+" if parameter[1] == "model" else "[^/]+"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    return tuple(
        (
            re.compile(_PARAMETER.sub(_any_value, re.escape(path))),
            tuple(method.upper() for method in operations),
        )
        for path, operations in document()["paths"].items()
    )


@cache
def _own_segments() -> frozenset[str]:
    ours = frozenset(path.split("/", 2)[1] for path in (*_control(), *_observation()))
    return ours - {path.decode().split("/", 2)[1] for path in routes.POSTS}


def is_ours(path: bytes) -> bool:
    """Whether the path, described or not, begins as one of ours that is no engine's."""
    before, slash, rest = path.decode("latin-1").partition("/")
    return bool(slash) and not before and rest.partition("/")[0] in _own_segments()


def methods_of(path: bytes) -> tuple[str, ...]:
    """The methods of this path, engines' and our own; empty for an unknown path."""
    if path == b"*":  # of the server as a whole (RFC 9110 9.3.7)
        return ("GET", "HEAD", "POST")
    if methods := routes.methods_of(path):
        return methods
    text = path.decode("latin-1")
    return next((methods for pattern, methods in _patterns() if pattern.fullmatch(text)), ())


def without_slash(target: bytes) -> bytes | None:
    """The target without the "/" at the end of its path, where only that has a route, of an engine
    or of our own for GET. Orders are not redirected."""
    path, mark, query = target.partition(b"?")
    if not path.endswith(b"/"):
        return None
    shorter = path.rstrip(b"/")
    if routes.methods_of(shorter) or (shorter != b"*" and "GET" in methods_of(shorter)):
        return shorter + mark + query
    return None
