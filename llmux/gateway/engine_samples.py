"""An engine's /metrics as samples, by a strict grammar: engines are not trusted to write it well.

Prometheus refuses a whole scrape for one bad line. So a line is a sample of the text format or it
is dropped, and what is kept obeys OpenMetrics too: no series twice, histograms complete and
cumulative, counters not negative.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

from llmux.metrics import PORTION

MAX_LINES: Final = 20_000  # of one engine; vLLM 0.32 writes 1,100
MAX_LINE: Final = 8192
MAX_SAMPLES: Final = 5_000  # of one engine; vLLM 0.32 has 600

_NAME: Final = "[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL: Final = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
_UNNAMED: Final = _LABEL.replace("([", "(?:[").replace('"((?:', '"(?:(?:')
_NUMBER: Final = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?Inf|NaN"
_SAMPLE: Final = re.compile(
    rf"({_NAME})(?:\{{((?:{_UNNAMED}(?:,{_UNNAMED})*,?)?)\}})? ({_NUMBER})(?: -?[0-9]+)?"
)
_LABELS: Final = re.compile(_LABEL)
_FLOAT: Final = re.compile(_NUMBER)
_COMMENT: Final = re.compile(rf"# (HELP|TYPE) ({_NAME}) (.*)")
_ESCAPE: Final = re.compile(r'\\([\\"n])')

Labels = tuple[tuple[str, str], ...]
Found = tuple[str, Labels, float, float | None]  # name, labels, value; the bound of a bucket
_PLAIN: Final = "unknown"
_BOUND: Final = {"histogram": "le", "summary": "quantile"}
_SUFFIXES: Final = {  # of the samples that families of a kind have
    "counter": ("_total", "_created"),
    "histogram": ("_bucket", "_count", "_sum", "_created"),
    "summary": ("", "_count", "_sum", "_created"),
}


@dataclass(slots=True)
class Family:
    """``groups``: samples that belong together, by the labels that they share."""

    name: str
    kind: str
    text: str
    groups: dict[Labels, list[Found]] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Every name that OpenMetrics keeps for a family of this kind."""
        return {self.name, *(self.name + suffix for suffix in _SUFFIXES.get(self.kind, ()))}


@dataclass(slots=True)
class EngineSamples:
    families: dict[str, Family] = field(default_factory=dict)
    dropped: int = 0


async def parse(text: bytes, prefixes: tuple[str, ...]) -> EngineSamples:
    """The samples whose names begin with one of ``prefixes``. Never raises; runs in portions."""
    reader = _Reader(prefixes)
    lines = text.split(b"\n", MAX_LINES)
    for start in range(0, len(lines), PORTION):
        for line in lines[start : start + PORTION]:
            reader.read(line)
        await asyncio.sleep(0)
    return reader.finish()


class _Reader:
    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes
        self._starts = tuple(prefix.encode() for prefix in prefixes)
        self._kinds: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._found: dict[tuple[str, Labels], float] = {}
        self._dropped = 0
        # Families have the same labels and bounds again and again: each is read once.
        self._labels: dict[str, Labels | None] = {}
        self._split: dict[tuple[Labels, str], tuple[Labels, Labels, float | None]] = {}

    def read(self, line: bytes) -> None:
        if line.startswith(b"#"):
            self._read_comment(line)
        elif line.startswith(self._starts) and not self._read_sample(line):
            self._dropped += 1

    def _read_comment(self, line: bytes) -> None:
        match = _COMMENT.fullmatch(line[:MAX_LINE].decode(errors="replace"))
        if match and match[2].startswith(self._prefixes):
            known = self._kinds if match[1] == "TYPE" else self._texts
            if len(known) < MAX_SAMPLES:
                known.setdefault(match[2], match[3])

    def _read_sample(self, line: bytes) -> bool:
        if len(line) > MAX_LINE or len(self._found) >= MAX_SAMPLES:
            return False
        match = _SAMPLE.fullmatch(line.decode(errors="replace"))
        if match is None:
            return False
        text = match[2] or ""
        if text not in self._labels:
            self._labels[text] = _read_labels(text)
        labels = self._labels[text]
        if labels is None or (match[1], labels) in self._found:
            return False
        self._found[match[1], labels] = float(match[3])
        return True

    def finish(self) -> EngineSamples:
        result = EngineSamples(dropped=self._dropped)
        homes: dict[str, tuple[str, str]] = {}
        for (name, labels), value in self._found.items():
            if name not in homes:
                homes[name] = self._family_of(name)
            base, kind = homes[name]
            if name == f"{base}_created":
                continue  # in OpenMetrics part of the family, in the text format one of its own
            family = result.families.get(base)
            if family is None:
                text = self._texts.get(base) or self._texts.get(name, "")
                unescaped = _ESCAPE.sub(_unescaped, text)
                family = result.families[base] = Family(base, kind, unescaped)
            if family.kind != kind:  # "x 1" beside a histogram x
                result.dropped += 1
                continue
            shared, whole, bound = self._split_off(labels, _BOUND.get(kind, ""))
            family.groups.setdefault(shared, []).append((name, whole, value, bound))
        for family in result.families.values():
            result.dropped += _keep_whole_groups(family)
        return result

    def _split_off(self, labels: Labels, name: str) -> tuple[Labels, Labels, float | None]:
        """The labels without the bound, with it as OpenMetrics writes it, and its value."""
        if not name:
            return labels, labels, None
        found = self._split.get((labels, name))
        if found is None:
            found = self._split[labels, name] = _split(labels, name)
        return found

    def _family_of(self, name: str) -> tuple[str, str]:
        """Name and kind of the family that a sample is in; its own when no other claims it."""
        kind = self._kinds.get(name, _PLAIN)
        if kind == "counter" and name.endswith("_total"):
            return name.removesuffix("_total"), kind
        if kind in ("gauge", "summary"):
            if kind == "gauge" and name.endswith("_created"):
                base = name.removesuffix("_created")
                if self._kinds.get(f"{base}_total") == "counter":
                    return base, "counter"
                if self._kinds.get(base) in ("histogram", "summary"):
                    return base, self._kinds[base]
            return name, kind
        base, _, suffix = name.rpartition("_")
        of_base = self._kinds.get(base)
        if of_base in ("histogram", "summary") and f"_{suffix}" in _SUFFIXES[of_base]:
            return base, of_base
        return name, _PLAIN


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def _read_labels(text: str) -> Labels | None:
    """Sorted; None when a name comes twice, is reserved, or is ours to set."""
    pairs = sorted(_LABELS.findall(text))
    names = {name for name, _ in pairs}
    if len(names) != len(pairs) or "model" in names or any(n.startswith("__") for n in names):
        return None
    if "\\" in text:
        return tuple((name, _ESCAPE.sub(_unescaped, value)) for name, value in pairs)
    return tuple(pairs)


# ---- what a family must be -----------------------------------------------------------------------


def _keep_whole_groups(family: Family) -> int:
    """Returns how many samples were dropped."""
    check = {"counter": _counter, "histogram": _histogram, "summary": _summary}.get(family.kind)
    if check is None:
        return 0
    dropped = 0
    for labels, samples in list(family.groups.items()):
        kept = check(family.name, samples)
        dropped += len(samples) - len(kept)
        if kept:
            family.groups[labels] = kept
        else:
            del family.groups[labels]
    return dropped


def _counter(name: str, samples: list[Found]) -> list[Found]:
    return [one for one in samples if one[2] >= 0]  # NaN is not


def _count(value: float) -> bool:
    return value >= 0 and math.isfinite(value) and value.is_integer()


def _histogram(name: str, samples: list[Found]) -> list[Found]:
    """In the order of the bounds, or nothing when it is not complete and cumulative."""
    buckets: dict[float, Found] = {}
    totals: dict[str, Found] = {}
    bucket = f"{name}_bucket"
    for sample in samples:
        bound = sample[3]
        if sample[0] != bucket:
            if bound is not None:
                return []
            totals[sample[0]] = sample
        elif bound is None or math.isnan(bound) or bound in buckets:
            return []
        else:
            buckets[bound] = sample
    ordered = [buckets[bound] for bound in sorted(buckets)]
    counts = [sample[2] for sample in ordered]
    count, total = totals.get(f"{name}_count"), totals.get(f"{name}_sum")
    if count is None or total is None or not total[2] >= 0 or math.inf not in buckets:
        return []
    cumulative = all(map(_count, counts)) and counts == sorted(counts) and counts[-1] == count[2]
    return [*ordered, count, total] if cumulative and min(buckets) >= 0 else []


def _summary(name: str, samples: list[Found]) -> list[Found]:
    quantiles: dict[float, Found] = {}
    totals: list[Found] = []
    for sample in samples:
        value, bound = sample[2:]
        if sample[0] == name:
            if bound is None or not 0 <= bound <= 1 or bound in quantiles or value < 0:
                return []
            quantiles[bound] = sample
        elif bound is None and value >= 0 and (sample[0] == f"{name}_sum" or _count(value)):
            totals.append(sample)
        else:
            return []
    return [*(quantiles[bound] for bound in sorted(quantiles)), *totals]


def _split(labels: Labels, name: str) -> tuple[Labels, Labels, float | None]:
    shared = tuple(pair for pair in labels if pair[0] != name)
    text = dict(labels).get(name)
    if text is None:
        return shared, labels, None
    bound = float(text) if _FLOAT.fullmatch(text) else math.nan
    canonical: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    whole = tuple((label, canonical if label == name else value) for label, value in labels)
    return shared, whole, bound


# ---- several engines -----------------------------------------------------------------------------


def merge(engines: Mapping[str, EngineSamples]) -> tuple[Iterator[Metric], dict[str, int]]:
    """All engines' families, each sample with its model, in portions of one name after the other;
    and how many samples of each engine were dropped.

    Where engines disagree about a family's kind, or two families would share a name, that of most
    engines is kept: one must not hide what the others say.
    """
    kinds = _agree(engines)
    members: dict[str, list[tuple[str, Family]]] = {}
    dropped = {model: samples.dropped for model, samples in engines.items()}
    for model, samples in sorted(engines.items()):
        for name, family in samples.families.items():
            if kinds.get(name) == family.kind:
                members.setdefault(name, []).append((model, family))
            else:
                dropped[model] += sum(map(len, family.groups.values()))
    return chain.from_iterable(map(_portions, members.values())), dropped


def _agree(engines: Mapping[str, EngineSamples]) -> dict[str, str]:
    """The kind of each family that is shown."""
    votes: dict[tuple[str, str], list[Family]] = {}
    for _, samples in sorted(engines.items()):
        for name, family in samples.families.items():
            if family.groups:
                votes.setdefault((name, family.kind), []).append(family)
    kinds: dict[str, str] = {}
    taken: set[str] = set()
    for (name, kind), families in sorted(votes.items(), key=lambda vote: -len(vote[1])):
        names = families[0].names()
        if taken.isdisjoint(names):
            kinds[name] = kind
            taken |= names
    return kinds


def _portions(members: Iterable[tuple[str, Family]]) -> Iterator[Metric]:
    metric: Metric | None = None
    for model, family in members:
        for group in family.groups.values():
            if metric is None:
                metric = Metric(family.name, family.text, family.kind)
            for name, labels, value, _ in group:
                metric.add_sample(name, {"model": model, **dict(labels)}, value)
            if len(metric.samples) >= PORTION:
                yield metric
                metric = None
    if metric is not None:
        yield metric
