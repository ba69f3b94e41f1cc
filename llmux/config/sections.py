"""Mappings with a fixed set of keys: each key to its parser, with a remedy for what is unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final

from llmux.config.marks import (
    Entry,
    Fault,
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
from llmux.config.parse import choice, listed, unknown_word
from llmux.config.schema import Eviction, Process, Weights

GoneKey = Callable[[Node], str]  # the value of a key that is no more → the remedy
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Spec:
    """The keys of one mapping.

    ``required`` maps a key to why it is needed, ``gone`` a key of earlier versions to its remedy,
    ``idle`` one that is still read and has no effect to the reason; ``defaults`` only tell whether
    an empty value can be meant.
    """

    parsers: Mapping[str, Parser[Any]]
    required: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    gone: Mapping[str, GoneKey] = field(default_factory=lambda: NOTHING)
    idle: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    defaults: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Section:
    """What could be read, the node each value came from, what was wrong with the rest, and what is
    right and has no effect."""

    values: Mapping[str, Any]
    entries: Mapping[str, Entry]
    faults: tuple[Fault, ...]
    notes: tuple[Fault, ...] = ()


def read_section(
    node: Node, spec: Spec, *, owner: Fault, homes: Mapping[str, str] = NOTHING
) -> Section:
    """Read one mapping.

    ``owner`` is where problems of the mapping as a whole are placed, and in words what it should
    be. ``homes`` tells where keys belong that are right in another mapping.
    """
    if isinstance(node, Scalar) and node.kind is Kind.NULL:
        node = Table(node.mark, ())  # "policy:" with every key under it commented out
    if not isinstance(node, Table):
        fault = Fault(node.mark, (), f"expected {owner.message}, got {describe(node)}")
        return Section(NOTHING, NOTHING, (fault,))
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    entries = {entry.key: entry for entry in node.entries}
    for key, entry in entries.items():
        if key not in spec.parsers:
            faults.append(Fault(entry.mark, (key,), _unknown_key(entry, spec, homes)))
            continue
        try:
            if _is_nothing(entry.value):
                _allow_nothing(entry, spec)
            else:
                values[key] = spec.parsers[key](entry.value)
        except ParseError as error:
            faults += (fault.under(key) for fault in error.faults)
    for key, why in spec.required.items():
        if key not in entries:
            faults.append(Fault(owner.mark, (key,), f"missing key {quote(key)}: {why}"))
    notes = []
    for key, why in spec.idle.items():
        if values.pop(key, None) is not None:
            notes.append(Fault(entries[key].mark, (key,), f"this key has no effect: {why}"))
    return Section(MappingProxyType(values), MappingProxyType(entries), tuple(faults), tuple(notes))


def _is_nothing(node: Node) -> bool:
    return isinstance(node, Scalar) and node.kind is Kind.NULL


def _allow_nothing(entry: Entry, spec: Spec) -> None:
    """An empty value is the default where "nothing" reads as such; elsewhere it is a slip."""
    default = spec.defaults.get(entry.key, "")
    if entry.key in spec.required:
        raise invalid(entry.value, f"has no value: {spec.required[entry.key]}")
    if isinstance(default, bool | int | float | str):
        shown = f" ({default:g})" if isinstance(default, float) else f" ({default})"
        shown = "" if default == "" else shown
        raise invalid(entry.value, f"has no value; remove the key to keep the default{shown}")


def _unknown_key(entry: Entry, spec: Spec, homes: Mapping[str, str]) -> str:
    key = entry.key
    if key in spec.gone:
        return spec.gone[key](entry.value)
    if key in homes:
        return f"unknown key {quote(key)} here; it belongs {homes[key]}"
    near = get_close_matches(key, list(spec.parsers), n=1)
    if near:
        return f"unknown key {quote(key)}; did you mean {quote(near[0])}?"
    return f"unknown key {quote(key)}; known here: {', '.join(spec.parsers)}"


_EVICTION = Spec(
    {"weights": choice(Weights), "process": choice(Process)},
    required={
        "weights": f"eviction needs both; one of {listed(Weights)}",
        "process": f"eviction needs both; one of {listed(Process)}",
    },
)
_EVICTION_SHAPE = (
    '{weights: ..., process: ...} or text such as "offload+keep_running" '
    f"(weights: {listed(Weights)}; process: {listed(Process)})"
)


def eviction(node: Node) -> Eviction:
    """``{weights, process}`` or ``weights+process``. All fifteen pairs are legal.

    ``stop`` makes the weights axis moot, retain+keep_running frees nothing: co-resident models want
    just that. A pair is refused only where the model cannot survive it (see ``check``).
    """
    if isinstance(node, Scalar) and node.kind is Kind.STRING:
        weights, plus, process = node.text.partition("+")
        if not plus:
            raise invalid(node, f"expected {_EVICTION_SHAPE}, got {quote(node.text)}")
        for word, words in ((weights, Weights), (process, Process)):
            if word not in list(words):
                raise invalid(node, unknown_word(word, words))
        return Eviction(Weights(weights), Process(process))
    section = read_section(node, _EVICTION, owner=Fault(node.mark, (), _EVICTION_SHAPE))
    if section.faults:
        raise ParseError(*section.faults)
    return Eviction(**section.values)
