"""JSON from outside into the dataclasses that describe it, checked by their own annotations.

Everything that another process wrote (messages, notes, manifests, answers) passes here once, so
that what is behind it can rely on the types. Never guesses: a value of another type is an error
that names its place.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

LARGEST_INT: Final = 2**63 - 1  # what the kernel and every other program can hold
MAX_DEPTH: Final = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Within:
    """The smallest and the largest number that a field may have, as part of its annotation."""

    low: float
    high: float


class BadJson(ValueError):
    """The text is not JSON, or not of the type that was expected; the message names the place."""


def parse(text: str | bytes) -> Any:
    """Any JSON value. Raises BadJson; NaN and infinities are not JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except ValueError as error:
        raise BadJson(str(error)) from error


def _no_constant(name: str) -> float:
    raise BadJson(f"{name} is not a JSON number")


def read(cls: type[T], value: Any) -> T:
    """``value``, a parsed JSON object, as ``cls``. Unknown keys are ignored: a newer peer may send
    them. Raises BadJson."""
    found: T = _dataclass(cls, value, "", 0)
    return found


def fits(annotation: Any, value: Any) -> bool:
    """Is ``value`` of that type, and in its range?"""
    try:
        _value(annotation, value, "", 0)
    except BadJson:
        return False
    return True


@cache
def _annotations(cls: type[Any]) -> Mapping[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: (field, hints[field.name]) for field in fields(cls) if field.init}


def _dataclass(cls: type[Any], value: Any, place: str, depth: int) -> Any:
    if not isinstance(value, dict):
        raise _wrong(place, "an object", value)
    arguments: dict[str, Any] = {}
    for name, (field, annotation) in _annotations(cls).items():  # type: ignore[arg-type]  # hashable
        where = f"{place}.{name}" if place else name
        if name in value:
            arguments[name] = _value(annotation, value[name], where, depth + 1)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise BadJson(f"{where} is missing")
    return cls(**arguments)


def _value(annotation: Any, value: Any, place: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise BadJson(f"{place[:80]}: nested too deeply")
    if annotation is Any:
        return value
    origin = get_origin(annotation)
    if origin is Annotated:
        return _within(annotation, value, place, depth)
    if origin in (Union, types.UnionType):
        return _union(annotation, value, place, depth)
    if origin is not None:
        return _container(origin, get_args(annotation), value, place, depth)
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return _dataclass(annotation, value, place, depth)
    return _scalar(annotation, value, place)


def _within(annotation: Any, value: Any, place: str, depth: int) -> Any:
    plain, bounds = get_args(annotation)
    number = _value(plain, value, place, depth)
    if not bounds.low <= number <= bounds.high:
        raise BadJson(f"{place}: the number is out of range")
    return number


def _union(annotation: Any, value: Any, place: str, depth: int) -> Any:
    members = get_args(annotation)
    if value is None and type(None) in members:
        return None
    problem: BadJson | None = None
    for member in members:
        if member is not type(None):
            try:
                return _value(member, value, place, depth + 1)
            except BadJson as error:
                problem = problem or error
    raise problem or _wrong(place, str(annotation), value)


def _container(origin: Any, arguments: tuple[Any, ...], value: Any, place: str, depth: int) -> Any:
    if issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(place, "an object", value)
        return {k: _value(arguments[1], v, f"{place}.{k}", depth + 1) for k, v in value.items()}
    if not issubclass(origin, Sequence) or not isinstance(value, list):
        raise _wrong(place, "a list", value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise _wrong(place, f"a list of {len(arguments)}", value)
        pairs = zip(arguments, value, strict=True)
        return tuple(_value(a, v, f"{place}[{i}]", depth + 1) for i, (a, v) in enumerate(pairs))
    items = [_value(arguments[0], v, f"{place}[{i}]", depth + 1) for i, v in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _scalar(annotation: Any, value: Any, place: str) -> Any:
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(place, "a number", value)
        if abs(value) > LARGEST_INT or not math.isfinite(value):
            raise BadJson(f"{place}: the number is out of range")
        return float(value)
    if annotation is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(place, "a whole number", value)
        if abs(value) > LARGEST_INT:
            raise BadJson(f"{place}: the number is out of range")
        return value
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        try:
            return annotation(value)
        except ValueError:
            raise _wrong(
                place, f"one of {', '.join(str(m.value) for m in annotation)}", value
            ) from None
    if annotation in (str, bool):
        if isinstance(value, annotation):
            return value
        raise _wrong(place, "a string" if annotation is str else "true or false", value)
    raise TypeError(f"{place}: {annotation!r} cannot be read from JSON")


def _wrong(place: str, expected: str, value: Any) -> BadJson:
    shown = repr(value) if isinstance(value, (str, bool, type(None))) else type(value).__name__
    return BadJson(f"{place[:200] or 'it'}: expected {expected}, got {shown[:60]}")
