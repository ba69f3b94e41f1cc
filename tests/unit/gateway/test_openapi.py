"""The description of our own routes: who may use one is decided by it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.gateway.control.app import build_app
from llmux.gateway.http import openapi
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
