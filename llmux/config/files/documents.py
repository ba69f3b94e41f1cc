"""Compose the tree of ``marks`` from YAML or JSON text. Pure, except ``read_text``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import yaml

from llmux.config.files.marks import (
    Entry,
    Fault,
    Items,
    KeyPath,
    Kind,
    Mark,
    Node,
    ParseError,
    Scalar,
    Table,
    describe,
    quote,
)
from llmux.small_files import read_small

MAX_FILE_BYTES = 8 * 1024 * 1024  # a thousand models fit in one; /dev/zero does not
MAX_DEPTH = 32  # the schema is four levels deep


def cause_of(error: OSError | ValueError) -> str:
    return ((error.strerror if isinstance(error, OSError) else None) or str(error)).lower()


def read_text(path: Path) -> str:
    """The file as text, or ``ParseError`` naming the file and, for bad bytes, the line."""
    here = Mark(str(path))
    try:
        data = _read(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ParseError(Fault(here, (), f"cannot read the file: {cause_of(error)}")) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        read = error.object  # without the byte order mark, as its positions are
        line = read.count(b"\n", 0, error.start) + 1
        column = error.start - read.rfind(b"\n", 0, error.start)
        mark = Mark(str(path), line, column)
        raise ParseError(Fault(mark, (), "cannot decode the file: it is not UTF-8 text")) from None


def _read(path: Path) -> bytes:
    if not str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
        return read_small(path, MAX_FILE_BYTES)
    with path.open("rb") as stream:  # `llmux check <(program)`: a pipe, and its writer is there
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    return data


def parse_text(text: str, file: str) -> tuple[Node | None, tuple[Fault, ...]]:
    """Return (tree, faults); the tree is None for an empty document.

    Files named ``*.json`` are JSON; any other text is JSON if it is valid as such and YAML if not.
    A JSON document is a YAML document once its tabs, which YAML forbids, are spaces; JSON's strings
    cannot contain a tab.
    """
    if file.endswith(".json"):
        _check_json(text, file)
        text = text.replace("\t", " ")
    elif text.lstrip().startswith("{"):
        try:
            _check_json(text, file)
        except ParseError:
            pass  # a YAML flow mapping: unquoted keys, comments, a trailing comma
        else:
            text = text.replace("\t", " ")
    return _YamlComposer(file).compose(text)


# Beginnings of the decoder's messages and our replacements; other messages are kept.
_JSON_PROBLEMS: Final = (
    ("Extra data", "nothing may follow the closing bracket"),
    ("Expecting property name", "expected a key in double quotes"),
    ("Illegal trailing comma", "expected a key in double quotes"),  # Python 3.13
    ("Expecting ':'", 'expected a ":" after the key'),
    ("Expecting ','", 'expected a comma or "{closing}"'),
)


def _check_json(text: str, file: str) -> None:
    """Raise ParseError unless the text is JSON."""
    try:
        json.loads(text, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        said = error.msg[:1].lower() + error.msg[1:]
        said = next((ours for theirs, ours in _JSON_PROBLEMS if error.msg.startswith(theirs)), said)
        if "{closing}" in said:
            said = said.format(closing=_closing_bracket(text[: error.pos]))
        mark = Mark(file, error.lineno, error.colno)
        raise ParseError(Fault(mark, (), f"cannot parse JSON: {said}")) from None
    except RecursionError:
        deep = "cannot parse JSON: the values are nested too deeply"
        raise ParseError(Fault(Mark(file), (), deep)) from None


def _closing_bracket(beginning: str) -> str:
    """The bracket that closes the innermost open value of this beginning of a JSON text."""
    missing: list[str] = []
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:\\.|[^"\\])*"', "", beginning)):
        if bracket in "[{":
            missing.append("]" if bracket == "[" else "}")
        else:
            missing.pop()
    return missing[-1]


def _table(mark: Mark, path: KeyPath, entries: Iterable[Entry], faults: list[Fault]) -> Table:
    kept: dict[str, Entry] = {}
    for entry in entries:
        first = kept.setdefault(entry.key, entry)
        if first is not entry:
            faults.append(
                Fault(
                    entry.mark,
                    (*path, entry.key),
                    f"the key {quote(entry.key)} is here twice (first in line {first.mark.line}); "
                    "remove one of them",
                )
            )
    return Table(mark, tuple(kept.values()))


def _join_surrogates(text: str) -> str | None:
    """Replace pairs of surrogates (JSON's escapes) by their characters; None for half a pair."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


_SURROGATES = "cannot use an unpaired surrogate escape; write the character itself"


# Numbers that PyYAML, which follows YAML 1.1, takes for text: 1e5, 2.5e-3 without a sign, NaN.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|NaN|-?Infinity", re.ASCII)

_TAG = "tag:yaml.org,2002:"
_KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        f"{_TAG}str": Kind.STRING,
        f"{_TAG}timestamp": Kind.STRING,  # read 2026-01-01 as text
        f"{_TAG}value": Kind.STRING,  # a lone "="
        f"{_TAG}merge": Kind.STRING,  # a "<<" that is no key
        f"{_TAG}int": Kind.NUMBER,
        f"{_TAG}float": Kind.NUMBER,
        f"{_TAG}bool": Kind.BOOLEAN,
        f"{_TAG}null": Kind.NULL,
    }
)


class _YamlComposer:
    """Convert PyYAML's nodes: aliases stay shared, merge keys are resolved."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.done: dict[int, Node] = {}
        self.active: set[int] = set()

    def compose(self, text: str) -> tuple[Node | None, tuple[Fault, ...]]:
        try:
            loader = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            column = error.position - text.rfind("\n", 0, error.position)
            bad = f"cannot parse: the character U+{error.character:04X} is not allowed in YAML"
            raise ParseError(Fault(Mark(self.file, line, column), (), bad)) from None
        try:
            root = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            raise ParseError(self.syntax_fault(error)) from None
        except RecursionError:
            deep = "cannot parse: the values are nested too deeply"
            raise ParseError(Fault(Mark(self.file), (), deep)) from None
        except (ValueError, OverflowError):
            # PyYAML lets Python's own errors through, for example for "\UFFFFFFFF" in a string.
            bad = "cannot parse: an escape or a number here is out of range"
            raise ParseError(Fault(self.place(loader.get_mark()), (), bad)) from None
        node = None if root is None else self.convert(root, ())
        return node, tuple(self.faults)

    def syntax_fault(self, error: yaml.MarkedYAMLError) -> Fault:
        start, mark = error.context_mark, error.problem_mark
        text = " ".join((error.problem or "").split())
        if text.startswith("but ") and error.context:
            text = f"{error.context}, {text}"
        elif error.context and start and mark and start.line != mark.line:
            text = f"{text}, {error.context} that starts in line {start.line + 1}"
        if "\\t" in text:
            text += " (YAML is indented with spaces, never with tabs)"
        elif "mapping values are not allowed" in text:
            text += " (check the indentation, and quote text that contains a colon and a space)"
        place = self.place(mark) if mark else Mark(self.file)
        return Fault(place, (), f"cannot parse: {text}")

    def place(self, mark: yaml.Mark) -> Mark:
        return Mark(self.file, mark.line + 1, mark.column + 1)

    def convert(self, node: yaml.Node, path: KeyPath) -> Node:
        ready = self.done.get(id(node))
        if ready is not None:
            return ready
        mark = self.place(node.start_mark)
        if id(node) in self.active:
            return self.replace(mark, path, "cannot use an alias inside the value it names")
        if len(path) > MAX_DEPTH:
            return self.replace(mark, path, "the values are nested too deeply")
        self.active.add(id(node))
        try:
            result = self.convert_new(node, mark, path)
        finally:
            self.active.discard(id(node))
        self.done[id(node)] = result
        return result

    def replace(self, mark: Mark, path: KeyPath, message: str) -> Scalar:
        self.faults.append(Fault(mark, path, message))
        return Scalar(mark, Kind.NULL, "")

    def convert_new(self, node: yaml.Node, mark: Mark, path: KeyPath) -> Node:
        match node:
            case yaml.ScalarNode() if node.tag in _KINDS:
                value = _join_surrogates(node.value)
                if value is None:
                    return self.replace(mark, path, _SURROGATES)
                kind = _KINDS[node.tag]
                if node.style is None and _NUMBER.fullmatch(value):
                    kind = Kind.NUMBER
                return Scalar(mark, kind, value)
            case yaml.SequenceNode(tag=tag) if tag == f"{_TAG}seq":
                items = (self.convert(item, (*path, i)) for i, item in enumerate(node.value))
                return Items(mark, tuple(items))
            case yaml.MappingNode(tag=tag) if tag == f"{_TAG}map":
                return self.convert_mapping(node, mark, path)
            case _:
                tag = str(node.tag).replace(_TAG, "!!")
                return self.replace(
                    mark, path, f"the YAML tag {tag} has no meaning here; remove it"
                )

    def convert_mapping(self, node: yaml.MappingNode, mark: Mark, path: KeyPath) -> Table:
        entries: list[Entry] = []
        merged: list[Entry] = []
        for key, value in node.value:
            key_mark = self.place(key.start_mark)
            name = _join_surrogates(key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                self.faults.append(Fault(key_mark, path, "a key must be one word of text"))
            elif key.tag == f"{_TAG}merge":
                merged += self.merged(value, (*path, "<<"))
            else:
                entries.append(Entry(name, key_mark, self.convert(value, (*path, name))))
        table = _table(mark, path, entries, self.faults)
        own = {entry.key: entry for entry in table.entries}
        for entry in merged:  # the mapping's own keys win, then the first one merged
            own.setdefault(entry.key, entry)
        return Table(mark, tuple(own.values()))

    def merged(self, value: yaml.Node, path: KeyPath) -> list[Entry]:
        node = self.convert(value, path)
        tables = node.items if isinstance(node, Items) else (node,)
        entries: list[Entry] = []
        for table in tables:
            if isinstance(table, Table):
                entries += table.entries
            else:
                self.faults.append(
                    Fault(table.mark, path, f'"<<" merges mappings, got {describe(table)}')
                )
        return entries
