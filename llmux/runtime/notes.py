"""What a supervisor notes for its successor, and reads back. Hints only, never the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

from llmux.config.schema import Eviction
from llmux.core.adopt import Note
from llmux.core.events import ModeSet
from llmux.core.records import Draining, Failed, Parked, Parking, Serving, State, Waking
from llmux.core.states import ModelState
from llmux.runtime.engines.executor import Executor
from llmux.runtime.engines.facts import Gpu
from llmux.typed_json import Within, fits

VERSION = 1
Failures = Annotated[int, Within(0, 1_000_000)]
MAX_EPOCH = 200  # characters; gateways send it back in each line
MAX_MESSAGE = 10_000


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
    epoch, message = document.get("epoch"), document.get("message")
    gpus, failures = document.get("gpus"), document.get("failures", 0)
    return Note(
        since=_moment(document.get("since")),
        until=_moment(document.get("until")),
        message=message[:MAX_MESSAGE] if isinstance(message, str) else "",
        failures=failures if fits(Failures, failures) else 0,
        state=state,
        epoch=epoch if isinstance(epoch, str) and len(epoch) <= MAX_EPOCH else None,
        eviction=eviction,
        gpus=tuple(gpu for gpu in gpus if fits(Gpu, gpu)) if isinstance(gpus, list) else (),
    )


def pins_in(document: Mapping[str, Any]) -> dict[str, float]:
    """Model → until when it is pinned; a damaged value counts as not written."""
    pins = document.get("pins")
    if not isinstance(pins, dict):
        return {}
    return {
        name: math.inf if until is None else float(until)
        for name, until in pins.items()
        if fits(float | None, until)
    }


def _moment(value: Any) -> float | None:
    return float(value) if fits(float, value) else None
