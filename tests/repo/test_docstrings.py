"""Names in docstrings exist: in the file, as a configuration key, a class or a module."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from test_layers import FILES, ROOT, module_of, nodes_of

QUOTED = re.compile(r"``([^`]+)``")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\))?")
KEYS = ROOT / "llmux/config/schema.py"  # what an operator may write
MODULES = {part for path in FILES for part in module_of(path).split(".")}
FOREIGN = {"c", "go", "img", "json", "yaml", "slice", "scope", "service", "N"}  # files and units
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def names_of(path: Path) -> set[str]:
    """Every identifier of the file, and every string in it that is a word of its own."""
    found: set[str] = set()
    docstrings = set()
    for node in nodes_of(path):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstrings.add(id(node.body[0].value))  # type: ignore[attr-defined]  # an Expr
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.update(name.split("."), [other] if other else [])
    for node in nodes_of(path):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
            if isinstance(text, str):
                found.update(re.findall(r"[A-Za-z_]\w*", text))
            else:
                found.add(repr(text))
    return found


def quoted_in(path: Path) -> Iterator[tuple[int, str]]:
    for node in nodes_of(path):
        if isinstance(node, DOCUMENTED):
            for name in QUOTED.findall(ast.get_docstring(node) or ""):
                yield getattr(node, "lineno", 1), name


@functools.cache
def defined() -> set[str]:
    """What the package defines: a docstring may point to it from another file, qualified."""
    nodes = (node for path in FILES for node in nodes_of(path))
    return {node.name for node in nodes if isinstance(node, DOCUMENTED) and hasattr(node, "name")}


@functools.cache
def classes() -> set[str]:
    nodes = (node for path in FILES for node in nodes_of(path))
    return {node.name for node in nodes if isinstance(node, ast.ClassDef)}


def test_docstrings_name_what_exists() -> None:
    for path in FILES:
        names = names_of(path) | names_of(KEYS) | MODULES | classes()
        for line, quoted in quoted_in(path):
            if quoted.endswith(".py"):
                there = [path.parent / quoted, ROOT / "llmux" / quoted, ROOT / quoted]
                assert any(file.exists() for file in there), (
                    f"{path.relative_to(ROOT)}:{line}: there is no file {quoted}"
                )
            elif DOTTED.fullmatch(quoted):
                owner, _, last = quoted.removesuffix("()").rpartition(".")
                elsewhere = defined() | FOREIGN if owner else set()
                assert last in names | elsewhere, (
                    f"{path.relative_to(ROOT)}:{line}: ``{quoted}`` is no name of this file"
                )
