"""Parse words, paths, lists and mappings: one node to one typed value, or ``ParseError``. Pure.

A parser's error says what it expected and what it got; it never clamps and never guesses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeVar

from llmux.config.files.marks import (
    Fault,
    Items,
    Kind,
    Node,
    ParseError,
    Parser,
    Scalar,
    Table,
    describe,
    invalid,
    quote,
)
from llmux.config.quantities import integer

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


def boolean(node: Node) -> bool:
    if isinstance(node, Scalar) and node.kind is Kind.BOOLEAN:
        return node.text.lower() in ("true", "yes", "on")
    hint = ""
    if isinstance(node, Scalar) and node.text.lower() in ("true", "false"):
        hint = " (remove the quotes)"
    raise invalid(node, f"expected true or false, got {describe(node)}{hint}")


def text(node: Node) -> str:
    """Non-empty text on one line, without control characters."""
    return line(node, "text")


def line(node: Node, what: str) -> str:
    """Non-empty text without control characters; ``what`` completes "expected …"."""
    if not isinstance(node, Scalar) or node.kind is not Kind.STRING:
        numeric = isinstance(node, Scalar) and node.kind in (Kind.NUMBER, Kind.BOOLEAN)
        hint = " (put it in quotes)" if numeric else ""
        raise invalid(node, f"expected {what}, got {describe(node)}{hint}")
    if not node.text.strip():
        raise invalid(node, f"expected {what}, got empty text")
    if re.search(r"[\x00-\x1f\x7f]", node.text):
        raise invalid(node, f"expected {what} without control characters, got {quote(node.text)}")
    return node.text


def choice(words: type[E]) -> Parser[E]:
    def parse(node: Node) -> E:
        word = line(node, f"one of {listed(words)}")
        try:
            return words(word)
        except ValueError:
            raise invalid(node, unknown_word(word, words)) from None

    return parse


def listed(words: type[StrEnum]) -> str:
    return ", ".join(words)


def unknown_word(word: str, words: type[StrEnum]) -> str:
    near = get_close_matches(word.lower(), list(words))
    hint = f" (did you mean {quote(near[0])}?)" if near else ""
    return f"unknown word {quote(word)}; allowed: {listed(words)}{hint}"


def absolute_path(node: Node) -> str:
    path = line(node, "an absolute path")
    if not path.startswith("/"):
        raise invalid(
            node,
            f"expected an absolute path, got {quote(path)} (the service runs in another directory; "
            "start the path with /)",
        )
    return path


def secret_path(node: Node) -> str:
    """An absolute path, or ``credential:NAME`` for a file from LoadCredential=."""
    value = text(node)
    if not re.fullmatch(r"/.+|credential:[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise invalid(node, f"expected an absolute path or credential:NAME, got {quote(value)}")
    return value


def executable(node: Node) -> str:
    """A bare name, searched on PATH, or an absolute path."""
    name = line(node, "the name or the absolute path of a program")
    if "/" in name and not name.startswith("/"):
        raise invalid(
            node,
            f"expected a bare program name or an absolute path, got {quote(name)} "
            "(the service runs in another directory; start the path with /)",
        )
    return name


def command(node: Node) -> tuple[str, ...]:
    """A program, or a list of a program and its leading arguments."""
    if not isinstance(node, Items):
        name = executable(node)
        if re.search(r"\s", name):
            words = ", ".join(quote(word) for word in name.split())
            raise invalid(
                node, f"{quote(name)} is not run by a shell; write it as a list: [{words}]"
            )
        return (name,)
    if not node.items:
        raise invalid(node, "expected a program and its arguments, got an empty list")
    program_and_arguments = listing(argument, "")(node)
    executable(node.items[0])
    return program_and_arguments


def argument(node: Node) -> str:
    """One command-line word. A number stays as written: 0.90 remains 0.90."""
    if isinstance(node, Scalar) and node.kind in (Kind.NUMBER, Kind.STRING):
        if "\0" in node.text:
            raise invalid(node, "cannot use a null byte in an argument")
        return node.text
    quotes = isinstance(node, Scalar) and node.kind is not Kind.NULL
    hint = " (put it in quotes)" if quotes else ""
    raise invalid(node, f"expected text, got {describe(node)}{hint}")


def model_path(node: Node) -> str:
    """A Hugging Face id, kept as it is, or the absolute path of a directory or file."""
    path = line(node, "a Hugging Face model id or an absolute path")
    if path.startswith((".", "~")):
        raise invalid(
            node,
            f"expected a Hugging Face model id such as Qwen/Qwen3-0.6B or an absolute path, got "
            f"{quote(path)} (start the path with /)",
        )
    if path.startswith("-"):
        raise invalid(node, f"expected a model, got the option {quote(path)}")
    return path


def alias(node: Node) -> str:
    """A further name of a model: any printable text, including "/"."""
    name = argument(node)
    if not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
        raise invalid(node, f"expected a name of up to 200 characters, got {quote(name)}")
    if name.startswith("-"):
        raise invalid(node, f"expected a name, got the option {quote(name)}")
    return name


def user_name(node: Node) -> str:
    name = line(node, "a user name")
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}\$?", name):
        raise invalid(node, f"expected the name of a system user, got {quote(name)}")
    return name


def file_mode(node: Node) -> str:
    """Octal digits, as chmod(1) takes them."""
    text = line(node, 'a mode such as "0660"')
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise invalid(node, f'expected a mode such as "0660", got {quote(text)}')
    return text


def listing(item: Parser[T], example: str) -> Parser[tuple[T, ...]]:
    def parse(node: Node) -> tuple[T, ...]:
        if not isinstance(node, Items):
            such = f" such as {example}" if example else ""
            raise invalid(node, f"expected a list{such}, got {describe(node)}")
        values: list[T] = []
        faults: list[Fault] = []
        for index, child in enumerate(node.items):
            try:
                values.append(item(child))
            except ParseError as error:
                faults += (fault.under(index) for fault in error.faults)
        if faults:
            raise ParseError(*faults)
        return tuple(values)

    return parse


def one_or_more(item: Parser[T], example: str) -> Parser[tuple[T, ...]]:
    """A list, or one value for a list of one."""
    several = listing(item, example)

    def parse(node: Node) -> tuple[T, ...]:
        return several(node) if isinstance(node, Items | Table) else (item(node),)

    return parse


def environment(node: Node) -> Mapping[str, str]:
    if not isinstance(node, Table):
        raise invalid(node, f"expected a mapping of variables to text, got {describe(node)}")
    values: dict[str, str] = {}
    faults: list[Fault] = []
    for entry in node.entries:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", entry.key):
            faults.append(
                Fault(entry.mark, (entry.key,), f"{quote(entry.key)} is not a variable name")
            )
            continue
        try:
            values[entry.key] = argument(entry.value)
        except ParseError as error:
            faults += (fault.under(entry.key) for fault in error.faults)
    if faults:
        raise ParseError(*faults)
    return MappingProxyType(values)


NO_MIG: Final = (
    "llmux divides whole GPUs and gives no MIG device to a model: switch MIG off"
    " (`nvidia-smi -mig 0`), and write indices such as [0, 1]"
)


def gpus(node: Node) -> tuple[int, ...] | int:
    """A number of GPUs, or a list of indices."""
    if not isinstance(node, Items):
        if isinstance(node, Table):
            raise invalid(node, "expected a number of GPUs, or a list of indices such as [0, 1]")
        return integer(1, 64, "a number of GPUs (or a list of indices such as [0, 1])")(node)
    if not node.items:
        raise invalid(node, "expected at least one GPU index, got an empty list")
    for position, item in enumerate(node.items):
        if isinstance(item, Scalar) and item.text.startswith("MIG-"):
            raise ParseError(Fault(item.mark, (position,), NO_MIG))
    indices = listing(integer(0, 63, "a GPU index"), "")(node)
    for position, index in enumerate(indices):
        if index in indices[:position]:
            twice = Fault(node.items[position].mark, (position,), f"GPU {index} is here twice")
            raise ParseError(twice)
    return indices
