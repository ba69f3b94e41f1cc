"""YAML and JSON text to the tree of ``marks``. Pure but for ``read_text``."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

import yaml

from llmux.config.marks import (
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

MAX_FILE_BYTES = 8 * 1024 * 1024  # a thousand models fit in one; /dev/zero does not
MAX_DEPTH = 32  # the schema is four levels deep


def cause_of(error: OSError | ValueError) -> str:
    return ((error.strerror if isinstance(error, OSError) else None) or str(error)).lower()


def read_text(path: Path) -> str:
    """The file as text, or ``ParseError`` naming the file and, for bad bytes, the line."""
    here = Mark(str(path))
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ParseError(Fault(here, (), f"cannot read the file: {cause_of(error)}")) from None
    if len(data) > MAX_FILE_BYTES:
        raise ParseError(Fault(here, (), f"cannot use a file larger than {MAX_FILE_BYTES} bytes"))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        mark = Mark(str(path), line, column)
        raise ParseError(Fault(mark, (), "cannot decode the file: it is not UTF-8 text")) from None


def parse_text(text: str, file: str) -> tuple[Node | None, tuple[Fault, ...]]:
    """The tree (None for an empty document) and what is wrong with it short of unreadable.

    Files named ``*.json`` are JSON; any other text is JSON if it is valid as such and YAML if not.
    YAML alone will not do: it forbids the tabs that JSON files are often indented with, and reads
    ``1e5`` as text.
    """
    if file.endswith(".json"):
        return _JsonComposer(text, file).compose()
    if text.lstrip().startswith("{"):
        try:
            return _JsonComposer(text, file).compose()
        except ParseError:
            pass  # a YAML flow mapping: unquoted keys, comments, a trailing comma
    return _YamlComposer(file).compose(text)


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


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


_SURROGATES = "cannot use an unpaired surrogate escape; write the character itself"


# Numbers that PyYAML, which follows YAML 1.1, takes for text: 1e5, 2.5e-3 without a sign.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", re.ASCII)

_TAG = "tag:yaml.org,2002:"
_KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        f"{_TAG}str": Kind.STRING,
        f"{_TAG}timestamp": Kind.STRING,  # 2026-01-01 is a word to us
        f"{_TAG}value": Kind.STRING,  # a lone "="
        f"{_TAG}merge": Kind.STRING,  # a "<<" that is no key
        f"{_TAG}int": Kind.NUMBER,
        f"{_TAG}float": Kind.NUMBER,
        f"{_TAG}bool": Kind.BOOLEAN,
        f"{_TAG}null": Kind.NULL,
    }
)


class _YamlComposer:
    """PyYAML's node graph to ours: aliases stay shared, merge keys are resolved."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.done: dict[int, Node] = {}
        self.active: set[int] = set()

    def compose(self, text: str) -> tuple[Node | None, tuple[Fault, ...]]:
        loader: yaml.SafeLoader | None = None
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            raise ParseError(self.syntax_fault(error)) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
            bad = f"cannot parse: the character U+{error.character:04X} is not allowed in YAML"
            raise ParseError(Fault(Mark(self.file, line, column), (), bad)) from None
        except RecursionError:
            deep = "cannot parse: the values are nested too deeply"
            raise ParseError(Fault(Mark(self.file), (), deep)) from None
        except (ValueError, OverflowError):
            # PyYAML lets Python's own errors through, e.g. for "\UFFFFFFFF" in a string.
            place = self.place(loader.get_mark()) if loader else Mark(self.file)
            bad = "cannot parse: an escape or a number here is out of range"
            raise ParseError(Fault(place, (), bad)) from None
        node = None if root is None else self.convert(root, ())
        return node, tuple(self.faults)

    def syntax_fault(self, error: yaml.MarkedYAMLError) -> Fault:
        start, mark = error.context_mark, error.problem_mark or error.context_mark
        text = " ".join((error.problem or error.context or "not YAML").split())
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
                if _has_surrogates(node.value):
                    return self.replace(mark, path, _SURROGATES)
                kind = _KINDS[node.tag]
                if node.style is None and _EXPONENT.fullmatch(node.value):
                    kind = Kind.NUMBER
                return Scalar(mark, kind, node.value)
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
            if not isinstance(key, yaml.ScalarNode) or _has_surrogates(key.value):
                self.faults.append(Fault(key_mark, path, "a key must be one word of text"))
            elif key.tag == f"{_TAG}merge":
                merged += self.merged(value, (*path, "<<"))
            else:
                entry = Entry(key.value, key_mark, self.convert(value, (*path, key.value)))
                entries.append(entry)
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


_JSON_SPACE = re.compile(r"[ \t\n\r]*")


class _JsonComposer:
    """Containers are walked here for their places; the standard library reads the scalars."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.faults: list[Fault] = []
        self.scalar = json.JSONDecoder()
        lengths = (len(line) for line in text.split("\n"))
        self.line_starts = list(accumulate(lengths, lambda at, n: at + n + 1, initial=0))[:-1]

    def compose(self) -> tuple[Node, tuple[Fault, ...]]:
        node, at = self.value(0, ())
        at = self.skip(at)
        if at < len(self.text):
            self.fail(at, "nothing may follow the closing bracket")
        return node, tuple(self.faults)

    def mark(self, at: int) -> Mark:
        line = bisect.bisect_right(self.line_starts, at)
        return Mark(self.file, line, at - self.line_starts[line - 1] + 1)

    def fail(self, at: int, message: str) -> NoReturn:
        raise ParseError(Fault(self.mark(at), (), f"cannot parse JSON: {message}"))

    def skip(self, at: int) -> int:
        found = _JSON_SPACE.match(self.text, at)
        return found.end() if found else at

    def peek(self, at: int) -> str:
        return self.text[at : at + 1]

    def value(self, at: int, path: KeyPath) -> tuple[Node, int]:
        at = self.skip(at)
        if len(path) > MAX_DEPTH:
            self.fail(at, "the values are nested too deeply")
        match self.peek(at):
            case "{":
                return self.table(at, path)
            case "[":
                return self.items(at, path)
        value, end = self.plain(at)
        mark = self.mark(at)
        match value:
            case str():
                if _has_surrogates(value):
                    self.faults.append(Fault(mark, path, _SURROGATES))
                    value = ""
                return Scalar(mark, Kind.STRING, value), end
            case bool():
                return Scalar(mark, Kind.BOOLEAN, self.text[at:end]), end
            case None:
                return Scalar(mark, Kind.NULL, ""), end
            case _:
                return Scalar(mark, Kind.NUMBER, self.text[at:end]), end

    def plain(self, at: int) -> tuple[object, int]:
        try:
            return self.scalar.raw_decode(self.text, at)
        except json.JSONDecodeError as error:
            self.fail(min(error.pos, len(self.text)), error.msg[:1].lower() + error.msg[1:])
        except ValueError:  # Python refuses to convert more than 4300 digits
            self.fail(at, "the number is too long")

    def table(self, at: int, path: KeyPath) -> tuple[Table, int]:
        mark = self.mark(at)
        entries: list[Entry] = []
        at = self.skip(at + 1)
        while self.peek(at) != "}":
            if entries:
                at = self.expect(at, ",", 'a comma or "}"')
            if self.peek(at) != '"':
                self.fail(at, "expected a key in double quotes")
            key_mark = self.mark(at)
            decoded, at = self.plain(at)
            key = str(decoded)
            if _has_surrogates(key):
                self.faults.append(Fault(key_mark, path, _SURROGATES))
                key = ""
            at = self.expect(self.skip(at), ":", 'a ":" after the key')
            value, at = self.value(at, (*path, key))
            entries.append(Entry(key, key_mark, value))
            at = self.skip(at)
        return _table(mark, path, entries, self.faults), at + 1

    def items(self, at: int, path: KeyPath) -> tuple[Items, int]:
        mark = self.mark(at)
        found: list[Node] = []
        at = self.skip(at + 1)
        while self.peek(at) != "]":
            if found:
                at = self.expect(at, ",", 'a comma or "]"')
            node, at = self.value(at, (*path, len(found)))
            found.append(node)
            at = self.skip(at)
        return Items(mark, tuple(found)), at + 1

    def expect(self, at: int, char: str, what: str) -> int:
        if self.peek(at) != char:
            self.fail(at, f"expected {what}")
        return self.skip(at + 1)
