"""What a supervisor writes down for its successor, and reads back. Hints only, never the truth."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.adopt import Note
from llmux.core.records import Draining, Parked, Parking, Serving, State, Waking
from llmux.core.states import ModelState
from llmux.ports import Canary
from llmux.protocol import Address
from llmux.runtime.executor import Executor

VERSION = 1


def parse_eviction(text: str) -> Eviction:
    """``weights+process``; ValueError names what is wrong."""
    weights, plus, process = text.partition("+")
    if not plus:
        raise ValueError(f'expected "weights+process", got {text!r}')
    return Eviction(Weights(weights), Process(process))


def notes_of(state: State, executor: Executor) -> dict[str, Any]:
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
        "manual": state.manual,
        "pinned": state.pinned,
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


def address_from(document: Mapping[str, Any]) -> Address | None:
    uds, port = document.get("uds"), document.get("port")
    if isinstance(uds, str):
        return Address(uds=uds)
    return Address(port=port) if isinstance(port, int) else None


def canary_from(document: Mapping[str, Any]) -> Canary | None:
    match document.get("canary"):
        case [str(text), [*logprobs]]:
            return Canary(text, tuple(float(p) for p in logprobs))
        case _:
            return None
