"""Imports point one way: cli, gateway → runtime → core → config → engines; drivers behind ports."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmux"

# What each part may import of llmux itself, besides itself. Anything not listed here is an error,
# so that a new part has to be given its place.
LEAVES = {
    f"llmux{name}"
    for name in (
        *(
            "",
            ".errors",
            ".metrics",
            ".names",
            ".peers",
            ".phases",
            ".printable",
            ".responses",
            ".small_files",
            ".trusted",
            ".typed_json",
        ),
    )
}
SCHEMA = {"llmux.config.schema", "llmux.config.choices", "llmux.engines"}
PORTS = {"llmux.ports", "llmux.image_ports", "llmux.protocol"}
ALLOWED: dict[str, set[str]] = {
    "llmux": set(),
    "llmux.errors": set(),
    "llmux.metrics": set(),
    "llmux.names": set(),
    "llmux.peers": set(),
    "llmux.phases": set(),
    "llmux.printable": set(),
    "llmux.responses": set(),
    "llmux.small_files": set(),
    "llmux.trusted": set(),
    "llmux.typed_json": set(),
    "llmux.__main__": {"llmux.cli"},
    "llmux.protocol": LEAVES,
    "llmux.ports": LEAVES | {"llmux.protocol"},
    "llmux.image_ports": {"llmux.ports"},
    "llmux.engines": {"llmux.errors"},
    "llmux.config": LEAVES | {"llmux.engines"},
    "llmux.core": {"llmux.errors"} | SCHEMA,
    "llmux.runtime": LEAVES | SCHEMA | PORTS | {"llmux.core"},
    "llmux.sim": {"llmux.errors", "llmux.core"} | SCHEMA,
    "llmux.drivers": LEAVES | SCHEMA | PORTS,
    "llmux.gateway": LEAVES | SCHEMA | PORTS,
    "llmux.cli": LEAVES | PORTS | {"llmux.config", "llmux.daemon", "llmux.engines", "llmux.sim"},
    "llmux.daemon": {"llmux"},
}
# What the decisions may use of the standard library.
PURE = {
    "__future__", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "itertools",
    "math", "operator", "types", "typing",
}  # fmt: skip
# Doors: module → the only parts that may go through it.
DOORS = {
    "subprocess": {"llmux.drivers"},
    "pystemd": {"llmux.drivers"},
    "sdnotify": {"llmux.drivers"},
    "ctypes": {"llmux.drivers"},
    "sanic": {"llmux.gateway"},
    "prometheus_client": {"llmux.metrics", "llmux.gateway"},
    "psutil": {"llmux.drivers"},
    "yaml": {"llmux.config"},
    "argparse": {"llmux.cli", "llmux.drivers"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The longest prefix that has rules of its own."""
    names = module.split(".")
    for end in range(len(names), 0, -1):
        if (prefix := ".".join(names[:end])) in ALLOWED:
            return prefix
    raise AssertionError(f"{module} has no place in ALLOWED")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                is_module = (ROOT / (full.replace(".", "/") + ".py")).exists()
                yield node.lineno, full if is_module else module


def within(module: str, part: str) -> bool:
    return module == part or (part != "llmux" and module.startswith(f"{part}."))


def test_imports_point_one_way() -> None:
    for path in FILES:
        part = part_of(module_of(path))
        allowed = ALLOWED[part]
        for line, imported in imports_of(path):
            if not (imported == "llmux" or imported.startswith("llmux.")):
                continue
            if part == "llmux.daemon" or (part != "llmux" and within(imported, part)):
                continue
            assert any(within(imported, one) for one in allowed), (
                f"{path.relative_to(ROOT)}:{line}: {part} may not import {imported}"
            )


def test_the_core_is_pure() -> None:
    for path in (path for path in FILES if "core" in path.parts):
        for line, imported in imports_of(path):
            top = imported.split(".")[0]
            assert top == "llmux" or top in PURE, (
                f"{path.relative_to(ROOT)}:{line}: the core decides; it may not use {imported}"
            )


def test_engine_types_are_pure() -> None:
    for path in (path for path in FILES if part_of(module_of(path)) == "llmux.engines"):
        for line, imported in imports_of(path):
            top = imported.split(".")[0]
            allowed = PURE | {"llmux", "re", "json", "struct"}
            assert top in allowed, f"{path.name}:{line}: {imported}"


def test_the_configuration_is_read_from_its_files_only() -> None:
    for path in (path for path in FILES if part_of(module_of(path)) == "llmux.config"):
        for node in nodes_of(path):
            name = getattr(node, "attr", None)
            assert name not in ("environ", "getenv"), f"{path.name}:{getattr(node, 'lineno', 0)}"


def test_each_outside_has_one_door() -> None:
    for path in FILES:
        module = module_of(path)
        for line, imported in imports_of(path):
            parts = DOORS.get(imported.split(".")[0])
            assert parts is None or any(within(module, part) for part in parts), (
                f"{path.relative_to(ROOT)}:{line}: {imported} belongs into {sorted(parts)}"
            )


def test_only_the_command_line_prints() -> None:
    for path in (path for path in FILES if "cli" not in path.parts):
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno}: print()"


def test_only_the_daemon_constructs_drivers() -> None:
    """Who cannot import them cannot construct them."""
    drivers = {module_of(path) for path in FILES if "drivers" in path.parts}
    users = {
        part_of(module_of(path))
        for path in FILES
        for _, imported in imports_of(path)
        if imported in drivers and "drivers" not in path.parts
    }
    assert users == {"llmux.daemon"}


LOOPS = {"asyncio", "uvloop", "ssl"}
DECISIONS = {"llmux.core", "llmux.runtime"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("llmux.daemon.gateway", {"sanic", "http", "hashlib"} | LOOPS | DECISIONS),
        ("llmux.daemon.gateway_worker", {"pystemd"} | DECISIONS),
        ("llmux.daemon.supervise", {"sanic", "llmux.gateway", "importlib.metadata"}),
        ("llmux.drivers.systemd.units", {"lxml"}),
        # What asks the supervisor starts in half the time without them.
        ("llmux.cli.ps", {"yaml", "llmux.config.schema", "llmux.engines"} | LOOPS),
    ],
)
def test_no_service_keeps_in_memory_what_others_need(modules: str, absent: set[str]) -> None:
    if "systemd" in modules and importlib.util.find_spec("pystemd") is None:
        pytest.skip("no pystemd here")
    program = f"import sys, llmux.cli.main, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert absent & set(done.stdout.split()) == set()
