"""The description of our own routes: who may use one is decided by it."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.gateway.control.app import build_app
from llmux.gateway.http import openapi, routes
from llmux.gateway.http.problems import STATUS_LINES


def test_every_route_is_described() -> None:
    gateway = SimpleNamespace(max_body_bytes=1)
    config: Any = SimpleNamespace(gateway=gateway)
    dispatch: Any = SimpleNamespace(worker=None)
    metrics: Any = None
    served: dict[str, set[str]] = {}
    for route in build_app(config, dispatch, metrics).router.routes:
        fixed = re.sub(r"<name:([a-z_]+)>", r"\1", f"/{route.path}")
        path = re.sub(r"<([a-z_]+):[a-z]+>", r"{\1}", fixed)
        served.setdefault(path, set()).update(route.methods - {"HEAD"})
    described = {path: {m.upper() for m in operations} for path, operations in paths().items()}
    assert {path: described.get(path) for path in served} == served


def test_every_described_answer_is_one_that_we_send() -> None:
    sent = {str(status) for status in (*STATUS_LINES, 200, 307)}
    for path, operations in paths().items():
        for method, operation in operations.items():
            assert set(operation["responses"]) <= sent | {"default"}, (method, path)


def test_the_description_says_what_the_table_says() -> None:
    """``tests/fixtures/openapi.txt`` was read through by a person; so is each change of it."""
    table = (Path(__file__).parents[2] / "fixtures" / "openapi.txt").read_text().splitlines()
    assert [line for path in paths() for line in described(path)] == table


def described(path: str) -> list[str]:
    """A line for each method: everything that is said of it."""
    return [
        " | ".join(
            (
                f"{method} {path}",
                operation.pop("summary"),
                " ".join(map(parameter, operation.pop("parameters", []))),
                body(operation.pop("requestBody", None)),
                " ".join(answer(*one) for one in operation.pop("responses").items()),
                str(operation or ""),
            )
        )
        for method, operation in deepcopy(paths()[path]).items()
    ]


def parameter(one: dict[str, Any]) -> str:
    schema = one["schema"]
    bounds = f"{schema['minimum']}..{schema['maximum']}" if "minimum" in schema else ""
    return f"{one['in']}:{one['name']}:{schema['type']}{bounds}{'!' * one.get('required', False)}"


def body(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    assert one["required"] is True
    ((kind, content),) = one["content"].items()
    schema = content["schema"]
    assert schema["type"] == "object"
    names = (f"{name}{'!' * (name in schema['required'])}" for name in schema["properties"])
    return f"{kind} {' '.join(names)}"


def answer(status: str, one: dict[str, Any]) -> str:
    ((kind, content),) = one["content"].items()
    shape = content["schema"].get("$ref", kind).rpartition("/schemas/")[2]
    told = one["description"] == openapi._TEXTS.get(int(status), "Done")
    return f"{status}:{shape}{'' if told else '?'}"


def paths() -> dict[str, Any]:
    found: dict[str, Any] = openapi.document()["paths"]
    return found


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        (b"/control/mode", True),
        (b"/control/not-described", True),
        (b"/logs", True),
        (b"/logs/org/one", True),
        (b"/nothing", False),
        (b"/v1/nothing", False),
        (b"/", False),
        (b"", False),
        (b"*", False),
        (b"control/mode", False),
        (b"//control/mode", False),
    ],
)
def test_what_begins_as_a_described_path_is_ours(path: bytes, ours: bool) -> None:
    assert openapi.is_ours(path) is ours


MODEL = {"model"}
BODIES: dict[str, tuple[set[str], set[str]]] = {  # path → what may be in it, what must
    "/control/mode": ({"mode"}, {"mode"}),
    "/control/pin": (MODEL, MODEL),
    "/control/switch": (MODEL, MODEL),
    "/control/wake": (MODEL, MODEL),
    "/control/sleep": ({"model", "eviction"}, MODEL),
    "/control/eviction": ({"model", "eviction"}, {"model", "eviction"}),
    "/control/restart": ({"models"}, {"models"}),
    "/control/cancel": ({"orders"}, {"orders"}),
    "/control/checkpoint": (MODEL, MODEL),
}


@pytest.mark.parametrize("path", BODIES)
def test_an_order_s_body_is_described(path: str) -> None:
    may, must = BODIES[path]
    schema = paths()[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert may <= set(schema["properties"])
    assert set(schema.get("required", ())) == must
    assert all(schema["properties"][name] for name in may)


def test_all_other_orders_have_none_and_logs_have_their_parameters() -> None:
    ours = {path for path in paths() if path.startswith("/control/") or path == "/unload"}
    for path in ours - set(BODIES):
        assert "requestBody" not in paths()[path].get("post", {}), path

    def parameters(path: str, method: str = "get") -> dict[str, Any]:
        given: list[Any] = paths()[path][method].get("parameters", [])
        return {one["name"]: (one["in"], one["schema"]) for one in given}

    lines = {"type": "integer", "minimum": 1, "maximum": 10_000}
    assert parameters("/logs")["lines"] == parameters("/logs/{model}")["lines"] == ("query", lines)
    assert parameters("/logs")["model"][0] == "query"
    assert parameters("/logs/{model}")["model"][0] == "path"
    assert parameters("/unload") == parameters("/unload", "post") != {}


def test_forms_are_described_as_forms_and_all_else_as_json() -> None:
    for path, match in routes.POSTS.items():
        described = openapi.document()["paths"][path.decode()]["post"]["requestBody"]["content"]
        form = match.route.source is routes.Source.FORM
        assert list(described) == ["multipart/form-data" if form else "application/json"], path
        (schema,) = (one["schema"] for one in described.values())
        assert ("file" in schema["properties"], schema["required"]) == (form, ["model"])


PLAIN = {"/metrics", "/logs", "/logs/{model}", "/logs/stream/{model}"}
STREAMS = {"/events", "/ui/feed"}
QUICK = {
    "/control/status", "/control/mode", "/control/unpin", "/control/eviction", "/control/cancel",
    "/running",
}  # fmt: skip


def kinds_of(answers: dict[str, Any], status: str) -> dict[str, Any]:
    content: dict[str, Any] = answers[status]["content"]
    return content


def test_each_answer_has_its_kind_and_each_error_its_shape() -> None:
    for path, operations in paths().items():
        for operation in operations.values():
            answers = operation["responses"]
            kind = "application/json"
            if path in PLAIN:
                kind = "text/plain; charset=utf-8"
            elif path in STREAMS:
                kind = "text/event-stream"
            assert kinds_of(answers, "200") == {kind: {"schema": {}}}, path
            shape = "AnthropicError" if "/messages" in path else "Error"
            for status in answers.keys() - {"200"}:
                ((kind, described),) = kinds_of(answers, status).items()
                assert kind == "application/json"
                assert described == {"schema": {"$ref": f"#/components/schemas/{shape}"}}, path
                assert isinstance(answers[status]["description"], str)


def test_each_route_says_which_errors_it_has() -> None:
    for path, operations in paths().items():
        for operation in operations.values():
            errors = set(map(int, operation["responses"])) - {200, 400, 401, 403}
            assert {400, 401, 403} <= set(map(int, operation["responses"])), path
            if path in QUICK:
                expected = {404, 413, 500, 503}
            elif path.startswith("/control/") or path == "/unload":
                expected = {404, 409, 413, 500, 503, 504}
            elif path.startswith("/logs"):
                expected = {404, 500, 503}
            elif path in ("/metrics", "/events"):
                expected = {500, 503}
            elif path in ("/ui/feed", "/ui/history", "/health/ready"):
                expected = {503}
            elif path == "/v1/models/{model}":
                expected = {404}
            elif path.encode() in routes.POSTS or "{response_id}" in path:
                expected = {404, 413, 415, 429, 500, 502, 503, 504}
            else:
                expected = set()
            assert errors == expected, path


def test_each_operation_is_well_described() -> None:
    for path, operations in paths().items():
        named = set(re.findall(r"{([a-z_]+)}", path))
        for operation in operations.values():
            assert isinstance(operation["summary"], str)
            parameters = operation.get("parameters", [])
            in_path = [one for one in parameters if one["in"] == "path"]
            assert {one["name"] for one in in_path} == named, path
            assert all(one["required"] is True for one in in_path)
            assert operation.get("requestBody", {"required": True})["required"] is True


def test_the_description_as_a_whole() -> None:
    document = openapi.document()
    assert document["openapi"] == "3.1.0"
    assert document["security"] == [{}, {"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    schemas = document["components"]["schemas"]
    assert {name: one["required"] for name, one in schemas.items()} == {
        "Error": ["error"], "AnthropicError": ["type", "error"],
    }  # fmt: skip
    inner = [one["properties"]["error"] for one in schemas.values()]
    assert [one["required"] for one in inner] == [
        ["message", "type", "param", "code"], ["type", "message"],
    ]  # fmt: skip
    for one in inner:
        assert list(one["properties"]) == one["required"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (b"*", {"GET", "HEAD", "POST"}),
        (b"/v1/completions", {"POST"}),
        (b"/v1/responses/r1", {"GET"}),
        (b"/control/eviction", {"GET", "POST"}),
        (b"/control/mode", {"POST"}),
        (b"/logs/org/one", {"GET"}),
        (b"/logs", {"GET"}),
        (b"/v1/models/a/b", {"GET"}),
        (b"/control/", set()),
        (b"/control/mode/x", set()),
        (b"/x/control/mode", set()),
    ],
)
def test_the_methods_of_a_path(path: bytes, methods: set[str]) -> None:
    assert set(openapi.methods_of(path)) == methods
