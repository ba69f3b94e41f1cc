"""A tree of values with their lines and columns, and the problems found in it.

Pure, and independent of the configuration's keys. Aliases share nodes, so walk the tree along a
schema only: a few nested aliases stand for more nodes than memory holds.
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
    """The type of a scalar in the file; the value completes "got …"."""

    STRING = "the text"
    NUMBER = "the number"
    BOOLEAN = "the boolean"
    NULL = "nothing"


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """``text`` has quotes and escapes undone; numbers stay as written."""

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
    """A problem; ``path`` is relative to the value that is being read."""

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
    """A value cannot be read. Carries at least one fault; caught within ``config``."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults


def invalid(node: Node, message: str) -> ParseError:
    return ParseError(Fault(node.mark, (), message))


@dataclass(frozen=True, slots=True)
class Marks:
    """The place of each configured value; a default has the place of what encloses it."""

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
    """Format a path as ``models.qwen3-0.6b.extra_args[2]``, with quotes where a key needs them."""
    out = ""
    for step in path:
        if isinstance(step, int):
            out += f"[{step}]"
        else:
            plain = re.fullmatch(r"[\w-][\w.-]*", step, re.ASCII) and ".." not in step
            out += ("." if out else "") + (step if plain else quote(step))
    return out


def quote(text: str) -> str:
    """Put the text in double quotes on one line, cut to a message's length."""
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def describe(node: Node) -> str:
    """Describe the node, to complete "expected …, got …"."""
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
