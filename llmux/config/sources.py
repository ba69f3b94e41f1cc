"""The configuration's files: the main one, then the drop-ins beside it, merged into one tree.

A drop-in adds models and overrides single keys of the sections; a model has one place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmux.config.documents import cause_of, parse_text, read_text
from llmux.config.marks import (
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
    """``complete`` is false when a file could not be parsed: what is known is then only a part."""

    root: Table
    files: tuple[str, ...]
    faults: tuple[Fault, ...]
    complete: bool


def read_sources(path: Path, conf_d: Path | None) -> Sources:
    faults: list[Fault] = []
    complete = True
    files = [path]
    folder = conf_d or path.parent / DROP_IN_FOLDER
    try:
        if conf_d or (path.name == MAIN_NAME and folder.is_dir()):
            files += _drop_ins(folder)
    except (OSError, ValueError) as error:
        faults.append(Fault(Mark(str(folder)), (), f"cannot list the folder: {cause_of(error)}"))
        complete = False
    root = Table(Mark(str(path)), ())
    for file in files:
        try:
            node, found = parse_text(read_text(file), str(file))
            faults += found
            root = _merge(root, _as_table(node, str(file)), faults)
        except ParseError as error:
            faults += error.faults
            complete = False
    return Sources(root, tuple(str(file) for file in files), tuple(faults), complete)


def _drop_ins(folder: Path) -> list[Path]:
    names = sorted(os.listdir(folder))
    # Hidden files are what editors leave; other suffixes are what dpkg leaves (.dpkg-old).
    return [folder / n for n in names if n.endswith(DROP_IN_SUFFIX) and not n.startswith(".")]


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
            merged[entry.key] = entry  # an empty "models:" in a drop-in adds none and takes none
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
