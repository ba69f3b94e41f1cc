"""No module of the package imports itself by a detour, imports for types included."""

from __future__ import annotations

import functools
import graphlib
from pathlib import Path

import pytest
from test_layers import FILES, imports_of, module_of


@functools.cache
def edges() -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, wherever in the file."""
    modules = {module_of(path) for path in FILES}
    return {
        module_of(path): {name for _, name in imports_of(path) if name in modules}
        - {module_of(path)}
        for path in FILES
    }


def test_no_module_imports_itself_by_a_detour() -> None:
    try:
        graphlib.TopologicalSorter(edges()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' → '.join(reversed(error.args[1]))}")


def packages(module: str) -> tuple[str, str]:
    """The part of llmux and the folder in it, such as ("gateway", "client")."""
    names = module.split(".")[1:]
    return (names[0], names[1]) if len(names) > 2 else (names[0], "")


def test_no_folder_imports_itself_by_a_detour() -> None:
    """Folders of one part: what stands above another is not imported by it.

    A part's own files (such as ``gateway/worker.py``) belong to no folder and are left out.
    """
    graph: dict[str, set[str]] = {}
    for module, imported in edges().items():
        if module == "llmux":
            continue
        part, folder = packages(module)
        for name in imported - {"llmux"}:
            other_part, other = packages(name)
            if part == other_part and folder and other and folder != other:
                graph.setdefault(f"{part}/{folder}", set()).add(f"{part}/{other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"folders import each other: {' → '.join(reversed(error.args[1]))}")


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
