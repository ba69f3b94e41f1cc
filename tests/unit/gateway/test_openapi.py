"""The description of our own routes: who may use one is decided by it."""

from __future__ import annotations

import re
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
