"""What a supervisor notes for its successor, and reads back. Hints only, never the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeGuard

from llmux.config.schema import Eviction
from llmux.core.adopt import Note
from llmux.core.events import ModeSet
from llmux.core.records import Draining, Failed, Parked, Parking, Serving, State, Waking
from llmux.core.states import ModelState
from llmux.runtime.engines.executor import Executor

VERSION = 1
MAX_GPUS = 1024  # more than any host has


def notes_of(state: State, executor: Executor, mode: ModeSet) -> dict[str, Any]:
    """``mode`` is what operators set; a validation may have replaced it for a while."""
    models: dict[str, Any] = {}
    for name, record in state.models.items():
        phase = record.phase
        note: dict[str, Any] = {"state": record.state.value, "gpus": list(record.gpus)}
        if isinstance(phase, (Serving, Parked, Failed)):
            note["since"] = phase.since  # on the monotonic clock, as all times here
        if isinstance(phase, Failed):
            note |= {"message": phase.message, "until": phase.until}
        if record.failures:
            note["failures"] = record.failures
        if isinstance(phase, (Serving, Draining)):
            note["epoch"] = phase.epoch
        if isinstance(phase, (Draining, Parking, Parked, Waking)):
            note["eviction"] = str(phase.eviction)
        if record.eviction_override is not None:
            note["override"] = str(record.eviction_override)
        if record.residue is not None:
            note["residue"] = record.residue
        models[name] = executor.notes(name) | note
    return {
        "version": VERSION,
        "manual": mode.manual,
        "pinned": mode.pinned,
        # on the monotonic clock, which goes on over a restart of the supervisor; null: for ever
        "pins": {m: None if until == math.inf else until for m, until in state.pins.items()},
        "models": models,
    }


def models_in(document: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The notes per model; nothing when the document is of another version or shape."""
    if document.get("version") != VERSION:
        return {}
    models = document.get("models")
    if not isinstance(models, dict):
        return {}
    return {name: note for name, note in models.items() if isinstance(note, dict)}


def note_from(document: Mapping[str, Any]) -> Note:
    """What can be read; a damaged value counts as not written."""
    state = eviction = None
    with suppress(ValueError):
        state = ModelState(str(document.get("state")))
    with suppress(ValueError):
        eviction = Eviction.parse(str(document.get("eviction")))
    epoch = document.get("epoch")
    gpus = document.get("gpus")
    message, failures = document.get("message"), document.get("failures")
    return Note(
        since=_moment(document.get("since")),
        until=_moment(document.get("until")),
        message=message if isinstance(message, str) else "",
        failures=failures if _is_count(failures) else 0,
        state=state,
        epoch=epoch if isinstance(epoch, str) else None,
        eviction=eviction,
        gpus=tuple(filter(_is_gpu, gpus)) if isinstance(gpus, list) else (),
    )


def pins_in(document: Mapping[str, Any]) -> dict[str, float]:
    """Model → until when it is pinned; a damaged value counts as not written."""
    pins = document.get("pins")
    if not isinstance(pins, dict):
        return {}
    numbers = {name: math.inf if until is None else until for name, until in pins.items()}
    return {
        name: float(until)
        for name, until in numbers.items()
        if isinstance(until, (int, float)) and not isinstance(until, bool)
    }


def _is_gpu(value: Any) -> bool:
    return _is_count(value) and value < MAX_GPUS


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _moment(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
