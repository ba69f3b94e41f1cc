"""What a supervisor writes down for its successor, and reads back. Hints only, never the truth."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llmux.core.adopt import Note
from llmux.core.events import ModeSet
from llmux.core.records import Draining, Parked, Parking, Serving, State, Waking
from llmux.core.states import ModelState
from llmux.runtime.executor import Executor
from llmux.runtime.words import parse_eviction

VERSION = 1


def notes_of(state: State, executor: Executor, mode: ModeSet) -> dict[str, Any]:
    """``mode`` is what operators want, which a validation may have set aside."""
    models: dict[str, Any] = {}
    for name, record in state.models.items():
        phase = record.phase
        note: dict[str, Any] = {"state": record.state.value, "gpus": list(record.gpus)}
        if isinstance(phase, (Serving, Draining)):
            note["epoch"] = phase.epoch
        if isinstance(phase, (Draining, Parking, Parked, Waking)):
            note["eviction"] = str(phase.eviction)
        if record.eviction_override is not None:
            note["override"] = str(record.eviction_override)
        models[name] = note | executor.notes(name)
    return {
        "version": VERSION,
        "manual": mode.manual,
        "pinned": mode.pinned,
        "models": models,
    }


def models_in(document: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The notes per model; nothing when the document is of another version or shape."""
    if document.get("version") != VERSION:
        return {}
    models = document.get("models")
    return models if isinstance(models, dict) else {}


def note_from(document: Mapping[str, Any]) -> Note:
    """Whatever can be read; a word that is not ours counts as not written."""
    state = eviction = None
    with suppress(ValueError):
        state = ModelState(str(document.get("state")))
    with suppress(ValueError):
        eviction = parse_eviction(str(document.get("eviction")))
    epoch = document.get("epoch")
    gpus = document.get("gpus")
    return Note(
        state=state,
        epoch=epoch if isinstance(epoch, str) else None,
        eviction=eviction,
        gpus=tuple(g for g in gpus if isinstance(g, int)) if isinstance(gpus, list) else (),
    )
