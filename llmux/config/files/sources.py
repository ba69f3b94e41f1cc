"""Read the main file and the drop-ins beside it, and merge them into one tree.

A drop-in adds models and overrides single keys of sections; it cannot change a model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmux.config.files.documents import cause_of, parse_text, read_text
from llmux.config.files.marks import (
    Entry,
    Fault,
    Kind,
    Mark,
    Node,
    ParseError,
    Scalar,
    Table,
    describe,
    quote,
)

MAIN_NAME: Final = "config.yaml"  # only this name has drop-ins: a lone file elsewhere is complete
DROP_IN_FOLDER: Final = "conf.d"
DROP_IN_SUFFIX: Final = ".yaml"


@dataclass(frozen=True, slots=True)
class Sources:
    """``complete`` is false when a file could not be parsed."""

    root: Table
    files: tuple[str, ...]
    faults: tuple[Fault, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that is to replace ``target``, one of the configuration's files or a new drop-in."""

    file: Path
    target: Path


def read_sources(path: Path, conf_d: Path | None, candidate: Candidate | None = None) -> Sources:
    """Problems in the candidate are placed in its target: that is the name people know."""
    faults: list[Fault] = []
    complete = True
    root = Table(Mark(str(path)), ())
    files = [path]
    folder = conf_d or path.parent / DROP_IN_FOLDER
    try:
        if conf_d or (path.name == MAIN_NAME and folder.is_dir()):
            files += _drop_ins(folder)
    except (OSError, ValueError) as error:
        faults.append(Fault(Mark(str(folder)), (), f"cannot list the folder: {cause_of(error)}"))
        complete = False
    if candidate and candidate.target not in files:
        if candidate.target.parent != folder or not _is_drop_in(candidate.target.name):
            expected = f"expected {path} or {folder}/NAME{DROP_IN_SUFFIX}"
            message = f"not a file of this configuration; {expected}"
            return Sources(root, (), (Fault(Mark(str(candidate.target)), (), message),), False)
        files = [path, *sorted([*files[1:], candidate.target])]
    for file in files:
        try:
            read = candidate.file if candidate and file == candidate.target else file
            node, found = parse_text(read_text(read), str(file))
            faults += found
            root = _merge(root, _as_table(node, str(file)), faults)
        except ParseError as error:
            faults += error.faults
            complete = False
    return Sources(root, tuple(str(file) for file in files), tuple(faults), complete)


def _drop_ins(folder: Path) -> list[Path]:
    names = sorted(os.listdir(folder))
    return [folder / name for name in names if _is_drop_in(name)]


def _is_drop_in(name: str) -> bool:
    """Hidden files are what editors leave; other suffixes are what dpkg leaves (.dpkg-old)."""
    return name.endswith(DROP_IN_SUFFIX) and not name.startswith(".")


def _as_table(node: Node | None, file: str) -> Table:
    match node:
        case Table():
            return node
        case None | Scalar(kind=Kind.NULL):
            return Table(Mark(file), ())
        case _:
            expected = "expected a mapping with keys such as models, policy and port"
            raise ParseError(Fault(node.mark, (), f"{expected}, got {describe(node)}"))


def _merge(base: Table, over: Table, faults: list[Fault]) -> Table:
    merged = {entry.key: entry for entry in base.entries}
    for entry in over.entries:
        below = merged.get(entry.key)
        if below and isinstance(below.value, Table) and isinstance(entry.value, Table):
            merge = _join_models if entry.key == "models" else _override
            section = merge(below.value, entry.value, faults)
            merged[entry.key] = Entry(entry.key, below.mark, section)
        elif not (below and isinstance(entry.value, Scalar) and entry.value.kind is Kind.NULL):
            merged[entry.key] = entry  # an empty "models:" in a drop-in changes nothing
    return Table(base.mark, tuple(merged.values()))


def _join_models(base: Table, over: Table, faults: list[Fault]) -> Table:
    merged = {entry.key: entry for entry in base.entries}
    for entry in over.entries:
        first = merged.setdefault(entry.key, entry)
        if first is not entry:
            faults.append(
                Fault(
                    entry.mark,
                    ("models", entry.key),
                    f"the model {quote(entry.key)} is already in {first.mark}; "
                    "keep it in one of the two files",
                )
            )
    return Table(base.mark, tuple(merged.values()))


def _override(base: Table, over: Table, _faults: list[Fault]) -> Table:
    merged = {entry.key: entry for entry in base.entries}
    merged |= {entry.key: entry for entry in over.entries}
    return Table(base.mark, tuple(merged.values()))
