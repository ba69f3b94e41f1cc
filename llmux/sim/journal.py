"""A trace and costs from a host's own journal: `journalctl -u llmux -o json`.

The supervisor writes when requests came, in seconds before the entry, with the mean time of an
answer, and what each switch took. Requests of the last minute may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmux.errors import LlmuxError
from llmux.sim.costs import Costs, ModelCosts
from llmux.sim.trace import Arrival

SWITCH = re.compile(
    r"(?P<model>\S+) serves after [0-9.]+ s"
    r" \((?P<how>cold|woken)(?:, in place of (?P<victims>.+?))?;"
    r" drain [0-9.]+ s, park (?P<park>[0-9.]+) s, (?:start|wake) (?P<up>[0-9.]+) s\)(?:, after .+)?"
)


def read_journal(lines: Iterable[str], models: Iterable[str]) -> tuple[list[Arrival], Costs]:
    """The trace begins at 0. Entries about models that are not configured are left out."""
    known = frozenset(models)
    arrivals: list[Arrival] = []
    samples: dict[tuple[str, str], list[float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _entry(line, number)
        if entry.get("LLMUX_MODEL") not in known:
            continue
        try:
            arrivals += _arrivals(entry)
        except (KeyError, ValueError, TypeError) as error:
            raise LlmuxError(f"cannot read line {number} of the journal: {error}") from error
        if (switch := SWITCH.fullmatch(str(entry.get("MESSAGE")))) is not None:
            up = "start" if switch["how"] == "cold" else "wake"
            samples.setdefault((switch["model"], up), []).append(float(switch["up"]))
            for victim in (switch["victims"] or "").split(", "):
                samples.setdefault((victim, "park"), []).append(float(switch["park"]))
    if not arrivals:
        raise LlmuxError(
            "cannot rebuild a trace: the journal says nothing of requests",
            hint="the supervisor writes once a minute: journalctl -u llmux -o json --since …",
        )
    first = min(arrival.at for arrival in arrivals)
    trace = sorted(Arrival(one.at - first, one.model, one.service) for one in arrivals)
    return trace, _costs(samples)


def _entry(line: str, number: int) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise LlmuxError(f"cannot read line {number} of the journal: {error}") from error
    if not isinstance(entry, dict):
        raise LlmuxError(f"cannot read line {number} of the journal: not an object")
    return entry


def _arrivals(entry: Mapping[str, Any]) -> list[Arrival]:
    if "LLMUX_ARRIVALS" not in entry:
        return []
    at = int(entry["__REALTIME_TIMESTAMP"]) / 1e6
    service = float(entry["LLMUX_DURATION_MS"]) / 1000
    model = str(entry["LLMUX_MODEL"])
    before = (float(text) for text in str(entry["LLMUX_ARRIVALS"]).split())
    return [Arrival(at - seconds, model, service) for seconds in before]


def _costs(samples: Mapping[tuple[str, str], list[float]]) -> Costs:
    """Means of each model's, and of all models' for one without its own."""
    every: dict[str, list[float]] = {}
    for (_, kind), values in samples.items():
        every.setdefault(kind, []).extend(values)
    default = {kind: _mean(values) for kind, values in every.items()}
    models: dict[str, dict[str, float]] = {}
    for (model, kind), values in samples.items():
        models.setdefault(model, {})[kind] = _mean(values)
    return Costs(
        ModelCosts(**default), {name: ModelCosts(**default | own) for name, own in models.items()}
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
