"""Sanic's attributes that the gateway relies on exist in the installed (pinned) version."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import sanic
from sanic.server.protocols.http_protocol import HttpProtocol

from llmux.gateway.client import sanic_bridge
from llmux.gateway.client.connection import ClientConnection
from llmux.gateway.client.sanic_bridge import PRIVATE, REPLACED, SanicBridge

PACKAGE = Path(sanic_bridge.__file__).parents[2]
SLOTS = {name for base in HttpProtocol.__mro__ for name in getattr(base, "__slots__", ())}


@pytest.mark.parametrize("name", PRIVATE)
def test_sanic_has_what_the_bridge_uses(name: str) -> None:
    assert name in SLOTS or callable(getattr(HttpProtocol, name, None)), sanic.__version__


@pytest.mark.parametrize("name", REPLACED)
def test_sanic_calls_what_the_bridge_replaces(name: str) -> None:
    assert callable(getattr(HttpProtocol, name, None)), sanic.__version__


def test_the_lists_are_complete() -> None:
    """Every attribute of ``self`` that the bridge does not define itself is listed."""
    tree = ast.parse(Path(sanic_bridge.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    own = {name for name in vars(SanicBridge) if not name.startswith("__")}
    assert used - own <= set(PRIVATE)
    both = own | {name for name in vars(ClientConnection) if not name.startswith("__")}
    assert {name for name in both if hasattr(HttpProtocol, name)} <= {*REPLACED, *PRIVATE}


def test_no_other_file_names_them() -> None:
    underscored = {name for name in PRIVATE if name.startswith("_")} | {"recv_buffer"}
    # _task is common: other classes have tasks of their own.
    underscored.discard("_task")
    for path in PACKAGE.rglob("*.py"):
        if path.name == "sanic_bridge.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr in underscored), path
