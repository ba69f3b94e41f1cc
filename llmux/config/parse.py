"""Value parsers: one node of the file to one typed value, or ``ParseError``. Pure.

A parser says what it expected and what it got; it never clamps and never guesses.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeVar

from llmux.config.marks import (
    Fault,
    Items,
    Kind,
    Node,
    ParseError,
    Scalar,
    Table,
    describe,
    invalid,
    quote,
)

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Parser = Callable[[Node], T]

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_LONGEST_NUMBER = 40  # digits; Python's own limit for int() is 4300, far beyond any range here

UNIT_SECONDS: Final[Mapping[str, float]] = MappingProxyType(
    {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
)
UNIT_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {"B": 1}
    | {f"{letter}B": 1000**i for i, letter in enumerate("kMGT", start=1)}
    | {f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", start=1)}
)


# --- numbers --------------------------------------------------------------------------------------


def integer(low: int, high: int, what: str = "a whole number") -> Parser[int]:
    def parse(node: Node) -> int:
        expected = f"expected {what} from {low} to {high}"
        text = _number_text(node, expected)
        if not _INTEGER.fullmatch(text):
            raise invalid(node, f"{expected}, got {text} (write a plain decimal number)")
        value = int(text)
        if not low <= value <= high:
            raise invalid(node, f"{expected}, got {text}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Parser[float]:
    """A number within [low, high], or (low, high] with ``above``."""

    def parse(node: Node) -> float:
        span = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
        return _decimal(node, f"expected a number {span}", low, high, above=above)

    return parse


def duration(unit: str, low: float, high: float) -> Parser[float]:
    """A plain number counts in ``unit`` ("s" or "ms"), and so does the result."""
    scale = UNIT_SECONDS[unit]
    limits = f"from {format_duration(low * scale)} to {format_duration(high * scale)}"
    span = f'a duration {limits}, such as {10 / scale:g} or "10s"'

    def parse(node: Node) -> float:
        expected = f"expected {span}"
        if not (isinstance(node, Scalar) and node.kind is Kind.STRING):
            return _decimal(node, expected, low, high)
        if _DECIMAL.fullmatch(node.text):
            raise _quoted_number(node, expected, ", or add a unit inside them")
        value = parse_duration(node.text)
        if value is None:
            units = ", ".join(UNIT_SECONDS)
            raise invalid(node, f"{expected}, got {quote(node.text)} (units: {units})")
        return _within(node, expected, round(value / scale, 9), low, high)

    return parse


def size(low: int, high: int) -> Parser[int]:
    def parse(node: Node) -> int:
        span = f"from {format_size(low)} to {format_size(high)}"
        expected = f'expected a size {span}, in bytes or with a unit, such as "20GiB"'
        if isinstance(node, Scalar) and node.kind is Kind.STRING:
            if _DECIMAL.fullmatch(node.text):
                raise _quoted_number(node, expected, ", or add a unit inside them")
            value = parse_size(node.text)
            if value is None:
                units = ", ".join(UNIT_BYTES)
                raise invalid(node, f"{expected}, got {quote(node.text)} (units: {units})")
        else:
            text = _number_text(node, expected)
            if not _INTEGER.fullmatch(text):
                raise invalid(node, f"{expected}, got {text} (write whole bytes, or a unit)")
            value = int(text)
        if not low <= value <= high:
            raise invalid(node, f"{expected}, got {node.text if isinstance(node, Scalar) else ''}")
        return value

    return parse


def parse_duration(text: str) -> float | None:
    """Seconds in "30s", "1.5m", "1h30m", "250ms"; None when it is not a duration."""
    parts = re.findall(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|[smhd])", text)
    if not parts or "".join(amount + unit for amount, unit in parts) != text:
        return None
    return sum(float(amount) * UNIT_SECONDS[unit] for amount, unit in parts)


def format_duration(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if seconds and seconds % UNIT_SECONDS[unit] == 0:
            return f"{int(seconds // UNIT_SECONDS[unit])}{unit}"
    return f"{seconds * 1000:g}ms" if seconds else "0"


def parse_size(text: str) -> int | None:
    """Bytes in "20GiB", "1.5 GB", "512B"; None when it is not a size. Decimal units are SI."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", text)
    if not found or found[2] not in UNIT_BYTES:
        return None
    return round(float(found[1]) * UNIT_BYTES[found[2]])


def format_size(value: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % UNIT_BYTES[unit] == 0:
            return f"{value // UNIT_BYTES[unit]}{unit}"
    return f"{value}B"


def _number_text(node: Node, expected: str) -> str:
    if not isinstance(node, Scalar) or node.kind is not Kind.NUMBER:
        if isinstance(node, Scalar) and _DECIMAL.fullmatch(node.text):
            raise _quoted_number(node, expected, "")
        raise invalid(node, f"{expected}, got {describe(node)}")
    if len(node.text) > _LONGEST_NUMBER:
        raise invalid(node, f"{expected}, got a number of {len(node.text)} characters")
    return node.text


def _quoted_number(node: Node, expected: str, more: str) -> ParseError:
    return invalid(node, f"{expected}, got {describe(node)} (remove the quotes{more})")


def _decimal(node: Node, expected: str, low: float, high: float, *, above: bool = False) -> float:
    text = _number_text(node, expected)
    if not _DECIMAL.fullmatch(text):  # .inf, .nan, 0x10, 1:30
        raise invalid(node, f"{expected}, got {text} (write a plain decimal number)")
    return _within(node, expected, float(text), low, high, above=above)


def _within(
    node: Node, expected: str, value: float, low: float, high: float, *, above: bool = False
) -> float:
    if not low <= value <= high or (above and value == low):
        raise invalid(node, f"{expected}, got {node.text if isinstance(node, Scalar) else value}")
    return value


# --- words and paths ------------------------------------------------------------------------------


def boolean(node: Node) -> bool:
    if isinstance(node, Scalar) and node.kind is Kind.BOOLEAN:
        return node.text.lower() in ("true", "yes", "on")
    hint = ""
    if isinstance(node, Scalar) and node.text.lower() in ("true", "false"):
        hint = " (remove the quotes)"
    raise invalid(node, f"expected true or false, got {describe(node)}{hint}")


def text(node: Node) -> str:
    """Non-empty text on one line, without control characters."""
    return _text(node, "text")


def _text(node: Node, what: str) -> str:
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
        word = _text(node, f"one of {listed(words)}")
        try:
            return words(word)
        except ValueError:
            raise invalid(node, unknown_word(word, words)) from None

    return parse


def listed(words: type[StrEnum]) -> str:
    return ", ".join(words)


def unknown_word(word: str, words: type[StrEnum]) -> str:
    near = get_close_matches(word.lower(), list(words), n=1)
    hint = f" (did you mean {quote(near[0])}?)" if near else ""
    return f"unknown word {quote(word)}; allowed: {listed(words)}{hint}"


def absolute_path(node: Node) -> str:
    path = _text(node, "an absolute path")
    if not path.startswith("/"):
        raise invalid(
            node,
            f"expected an absolute path, got {quote(path)} (the service runs in another directory; "
            "start the path with /)",
        )
    return path


def secret_path(node: Node) -> str:
    """A file of its own, or one that systemd hands over (LoadCredential=)."""
    value = text(node)
    if not re.fullmatch(r"/.+|credential:[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise invalid(node, f"expected an absolute path or credential:NAME, got {quote(value)}")
    return value


def executable(node: Node) -> str:
    """A bare name, searched on PATH, or an absolute path."""
    name = _text(node, "the name or the absolute path of a program")
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
    """One command-line word. Numbers count as they are written: 0.90 stays 0.90."""
    if isinstance(node, Scalar) and node.kind in (Kind.NUMBER, Kind.STRING):
        if "\0" in node.text:
            raise invalid(node, "cannot use a null byte in an argument")
        return node.text
    quotes = isinstance(node, Scalar) and node.kind is not Kind.NULL
    hint = " (put it in quotes)" if quotes else ""
    raise invalid(node, f"expected text, got {describe(node)}{hint}")


def model_path(node: Node) -> str:
    """A Hugging Face id, kept as it is, or the absolute path of a directory or file."""
    path = _text(node, "a Hugging Face model id or an absolute path")
    if path.startswith((".", "~")):
        raise invalid(
            node,
            f"expected a Hugging Face model id such as Qwen/Qwen3-0.6B or an absolute path, got "
            f"{quote(path)} (start the path with /)",
        )
    if path.startswith("-"):
        raise invalid(node, f"expected a model, got the option {quote(path)}")
    return path


def origin(node: Node) -> str:
    """A web page's origin as browsers send it, or * for all."""
    text = _text(node, "an origin")
    if text != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]{1,255}", text):
        raise invalid(
            node, f'expected an origin such as "https://chat.example.org" or "*", got {quote(text)}'
        )
    return text.lower()


def alias(node: Node) -> str:
    """What a client may call a model: any printable text, "/" included."""
    name = argument(node)
    if not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
        raise invalid(node, f"expected a name of up to 200 characters, got {quote(name)}")
    if name.startswith("-"):
        raise invalid(node, f"expected a name, got the option {quote(name)}")
    return name


def user_name(node: Node) -> str:
    name = _text(node, "a user name")
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}\$?", name):
        raise invalid(node, f"expected the name of a system user, got {quote(name)}")
    return name


def listen_address(node: Node) -> str:
    examples = '"127.0.0.1:3000", "[::1]:3000" or "unix:/run/llmux/http.sock"'
    expected = f"expected an address such as {examples}"
    if isinstance(node, Scalar) and node.kind is Kind.NUMBER:
        raise invalid(node, f"{expected}, got only the port {node.text} (add the host before it)")
    address = _text(node, "an address")
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path.startswith("/"):
            raise invalid(node, f"{expected}, got {quote(address)} (the path must be absolute)")
        if len(path.encode()) > 107:  # sun_path in unix(7), less the final null byte
            raise invalid(node, "cannot listen on a socket path longer than 107 bytes")
        return address
    host, colon, port_text = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port_text):
        raise invalid(node, f"{expected}, got {quote(address)}")
    if not 1 <= int(port_text) <= 65535:
        raise invalid(node, f"expected a port from 1 to 65535 in {quote(address)}")
    if host in ("", "*"):
        raise invalid(
            node, f"{expected}, got {quote(address)} (every address is 0.0.0.0 or [::], in full)"
        )
    if not _is_host(host):
        raise invalid(node, f"{expected}, got {quote(address)} ({quote(host)} is not a host)")
    return address


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of a parsed listen address; None for a unix socket."""
    if address.startswith("unix:"):
        return None
    host, _, port_text = address.rpartition(":")
    return host.strip("[]"), int(port_text)


def _is_host(host: str) -> bool:
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        return ipaddress.ip_address(host[1:-1] if bracketed else host).version == (
            6 if bracketed else 4
        )
    except ValueError:
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        # A name that is all digits and dots is a mistyped address.
        return bool(re.fullmatch(rf"(?=.*[A-Za-z]){label}(\.{label})*", host))


# --- lists and mappings ---------------------------------------------------------------------------


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
    """A list, or one value in place of a list of one."""
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


def gpus(node: Node) -> tuple[int, ...] | int:
    """A count to be placed, or the indices themselves."""
    if not isinstance(node, Items):
        if isinstance(node, Table):
            raise invalid(node, "expected a number of GPUs, or a list of indices such as [0, 1]")
        return integer(1, 64, "a number of GPUs (or a list of indices such as [0, 1])")(node)
    if not node.items:
        raise invalid(node, "expected at least one GPU index, got an empty list")
    indices = listing(integer(0, 63, "a GPU index"), "")(node)
    for position, index in enumerate(indices):
        if index in indices[:position]:
            twice = Fault(node.items[position].mark, (position,), f"GPU {index} is here twice")
            raise ParseError(twice)
    return indices
