"""Parse and format numbers, durations and sizes. Pure.

Never clamps: an error for a value out of range prints the range.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from llmux.config.files.marks import (
    Kind,
    Node,
    ParseError,
    Parser,
    Scalar,
    describe,
    invalid,
    quote,
)

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


def integer(low: int, high: int, what: str = "a whole number") -> Parser[int]:
    def parse(node: Node) -> int:
        expected = f"expected {what} from {low} to {high}"
        value = _whole(node, expected, "write a plain decimal number")
        return int(_within(node, expected, value, low, high))

    return parse


def number(low: float, high: float, *, above: bool = False) -> Parser[float]:
    """A number within [low, high], or (low, high] with ``above``."""

    def parse(node: Node) -> float:
        span = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
        return _decimal(node, f"expected a number {span}", low, high, above=above)

    return parse


def duration(unit: str, low: float, high: float) -> Parser[float]:
    """The result and plain numbers are in ``unit`` ("s" or "ms")."""
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
            value = _whole(node, expected, "write whole bytes, or a unit")
        return int(_within(node, expected, value, low, high))

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


def _whole(node: Node, expected: str, hint: str) -> int:
    text = _number_text(node, expected)
    if not _INTEGER.fullmatch(text):
        raise invalid(node, f"{expected}, got {text} ({hint})")
    return int(text)


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
