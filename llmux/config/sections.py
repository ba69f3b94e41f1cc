"""Parse mappings with a fixed set of keys; unknown keys get a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

from llmux.config import addresses, quantities
from llmux.config.files.marks import (
    Entry,
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
from llmux.config.parse import choice, listed, listing, one_or_more, unknown_word
from llmux.config.schema import Eviction, Limits, Process, Weights

GoneKey = Callable[[Node], str]  # value of a removed key → remedy
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Spec:
    """The keys of one mapping.

    ``required``: why a key is needed. ``gone``: remedies for keys of earlier versions. ``idle``:
    why an accepted key has no effect. ``defaults`` decide whether an empty value is allowed.
    """

    parsers: Mapping[str, Parser[Any]]
    required: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    gone: Mapping[str, GoneKey] = field(default_factory=lambda: NOTHING)
    idle: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    defaults: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Section:
    """The values read, their entries, the faults of the rest, and notes on keys without effect."""

    values: Mapping[str, Any]
    entries: Mapping[str, Entry]
    faults: tuple[Fault, ...]
    notes: tuple[Fault, ...] = ()


def read_section(
    node: Node, spec: Spec, *, owner: Fault, homes: Mapping[str, str] = NOTHING
) -> Section:
    """Read one mapping.

    ``owner`` has the place for problems of the whole mapping, and its message completes "expected
    …". ``homes``: where keys belong that are valid in another mapping.
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
    """Accept an empty value where the default is "nothing"; elsewhere it is an error."""
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
    near = get_close_matches(key, list(spec.parsers))
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
    """``{weights, process}``, ``weights+process`` or ``stop``. All fifteen pairs are legal.

    With a process of STOP the weights axis does not matter; retain+keep_running frees nothing,
    which suits co-resident models. ``check`` refuses a pair that the model does not survive.
    """
    if isinstance(node, Scalar) and node.kind is Kind.STRING:
        if node.text == Process.STOP:
            return Eviction(Weights.RETAIN, Process.STOP)  # which weights does not matter
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


_LADDER = listing(eviction, '["offload+keep_running", "offload+checkpoint", "retain+stop"]')


def ladder(node: Node) -> tuple[Eviction, ...]:
    """One eviction, or several: each takes the processes further than the one before."""
    if not isinstance(node, Items):
        return (eviction(node),)
    rungs = _LADDER(node)
    if not rungs:
        raise invalid(node, f"expected {_EVICTION_SHAPE}, or a list of them, got an empty list")
    order = list(Process)
    for index, (above, rung) in enumerate(pairwise(rungs), start=1):
        if order.index(rung.process) <= order.index(above.process):
            text = f"{rung} takes the processes no further than {above}"
            raise invalid(node.items[index], f"{text}; the order is {listed(Process)}")
    return rungs


_NETWORKS: Final = one_or_more(addresses.network, '["10.0.0.0/8"]')
_LIMITS = Spec(
    {
        "memory_max": quantities.size(64 * 1024**2, 1024**5),
        "memory_max_share": quantities.number(0, 1, above=True),
        "tasks_max": quantities.integer(16, 4_194_304),
        "ip_address_deny": _NETWORKS,
        "ip_address_allow": _NETWORKS,
    }
)
_LIMITS_SHAPE = "a mapping such as {memory_max: 64GiB, ip_address_allow: [10.0.0.0/8]}"


def limits(node: Node) -> Limits:
    section = read_section(node, _LIMITS, owner=Fault(node.mark, (), _LIMITS_SHAPE))
    if section.faults:
        raise ParseError(*section.faults)
    found = dict(section.values)
    for key in ("ip_address_deny", "ip_address_allow"):
        if key in found:
            found[key] = tuple(dict.fromkeys(part for parts in found[key] for part in parts))
    return Limits(**found)
