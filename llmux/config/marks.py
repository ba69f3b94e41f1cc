"""A small tree in which every value knows its line and column, and the problems found in it.

Pure. Nothing here knows a key of the configuration. The tree is shared where the file uses anchors
and aliases, so it may be walked only along a schema, never blindly: a few nested aliases stand for
more nodes than memory holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeVar

from llmux.errors import Problem

T = TypeVar("T")
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in a file; line and column count from 1, as editors do."""

    file: str
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Kind(StrEnum):
    """What a scalar is before the schema has its say; the value completes "got …"."""

    STRING = "the text"
    NUMBER = "the number"
    BOOLEAN = "the boolean"
    NULL = "nothing"


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """``text`` is what the file says with quotes and escapes undone; numbers stay as written."""

    mark: Mark
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    mark: Mark
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One ``key: value``; ``mark`` is the key's place."""

    key: str
    mark: Mark
    value: Node


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A mapping in file order, each key once."""

    mark: Mark
    entries: tuple[Entry, ...]


Node = Scalar | Items | Table
Parser = Callable[[Node], T]  # raises ParseError


@dataclass(frozen=True, slots=True)
class Fault:
    """A problem whose path is still relative to the value that was being read."""

    mark: Mark
    path: KeyPath
    message: str

    def under(self, *steps: str | int) -> Fault:
        return Fault(self.mark, (*steps, *self.path), self.message)

    def problem(self) -> Problem:
        return Problem(
            self.mark.file, self.mark.line, self.mark.column, dotted(self.path), self.message
        )


class ParseError(Exception):
    """A value cannot be read; carries at least one fault. Never leaves ``config``."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults


def invalid(node: Node, message: str) -> ParseError:
    return ParseError(Fault(node.mark, (), message))


@dataclass(frozen=True, slots=True)
class Marks:
    """Where each configured value came from; defaults have the place of what encloses them."""

    table: Mapping[KeyPath, Mark]
    origin: Mark

    def at(self, path: KeyPath) -> Mark:
        while path:
            if path in self.table:
                return self.table[path]
            path = path[:-1]
        return self.origin

    def fault(self, path: KeyPath, message: str) -> Fault:
        return Fault(self.at(path), path, message)

    def problem(self, path: KeyPath, message: str) -> Problem:
        return self.fault(path, message).problem()


NO_MARKS: Final = Marks(MappingProxyType({}), Mark("(configuration)"))


def dotted(path: KeyPath) -> str:
    """``models.qwen3-0.6b.extra_args[2]``; keys that could be misread are put in quotes."""
    out = ""
    for step in path:
        if isinstance(step, int):
            out += f"[{step}]"
        else:
            plain = re.fullmatch(r"[\w-][\w.-]*", step, re.ASCII) and ".." not in step
            out += ("." if out else "") + (step if plain else quote(step))
    return out


def quote(text: str) -> str:
    """The text in double quotes on one line, short enough for a message."""
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def describe(node: Node) -> str:
    """What stands in the file, completing "expected …, got …"."""
    match node:
        case Table():
            return "a mapping"
        case Items():
            return "a list"
        case Scalar(kind=Kind.NULL):
            return "nothing"
        case Scalar(kind=Kind.STRING):
            return f"the text {quote(node.text)}"
        case Scalar():
            return f"{node.kind} {node.text if len(node.text) <= 40 else node.text[:37] + '...'}"
