"""Every dependency that the project names is imported, and nothing else is."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib

from test_layers import FILES, ROOT, nodes_of

MODULES = {"pyyaml": "yaml"}  # where a distribution's module has another name


def requirement(text: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", text)
    assert match
    return match[0].lower()


def module(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))


@functools.cache
def imported() -> dict[str, str]:
    """Module → a file of llmux that imports it, of those that are not Python's or ours."""
    found: dict[str, str] = {}
    for path in FILES:
        for node in nodes_of(path):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom)
                else []
            )  # fmt: skip
            for name in names:
                found.setdefault(name.partition(".")[0], str(path.relative_to(ROOT)))
    own = sys.stdlib_module_names | {"llmux"}
    return {name: path for name, path in found.items() if name not in own}


def project() -> set[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return {requirement(text) for text in tomllib.load(file)["project"]["dependencies"]}


def of_sanic() -> set[str]:
    """What Sanic itself needs, extras aside: it is in no distribution, so the package lists it."""
    texts = importlib.metadata.requires("sanic") or []
    return {requirement(text) for text in texts if "extra ==" not in text}


def debian() -> set[str]:
    text = (ROOT / "packaging/debian/control").read_text(encoding="utf-8")
    match = re.search(r"^Depends:(.*?)^(?=\S)", text, re.M | re.S)
    assert match
    names = {requirement(entry.strip()) for entry in match[1].split(",") if entry.strip()[0] != "$"}
    prefixed = {name.removeprefix("python3-") for name in names if name.startswith("python3-")}
    return {"pyyaml" if name == "yaml" else name for name in prefixed}


def test_what_the_project_names_is_imported() -> None:
    assert {module(name) for name in project()} <= imported().keys()


def test_what_the_package_depends_on_is_imported_by_llmux_or_by_sanic() -> None:
    unused = debian() - of_sanic()
    assert {module(name) for name in unused} <= imported().keys()
    assert unused, "the package depends on something"


def test_nothing_else_is_imported() -> None:
    """httptools and uvloop come with Sanic."""
    named = {module(name) for name in project() | of_sanic()}
    assert {name: path for name, path in imported().items() if name not in named} == {}
