"""What was seen of engines' GPU memory, kept over a reboot: a sleep's residue, and the use awake.

Kept by model with the digest of how its engine is started: another command line is another engine.
A hint, as the notes are: what cannot be read is learned again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llmux.core.effects import SwitchFinished
from llmux.core.records import ModelRecord, State
from llmux.errors import StateFileError
from llmux.ports import StateStore
from llmux.runtime.engines.gpu_memory import warn_of_claim
from llmux.runtime.engines.launch import launch_digest
from llmux.runtime.host import Places

log = logging.getLogger("llmux")


class Learned:
    """A listener of the loop. ``store`` outlives the host's boot."""

    def __init__(self, store: StateStore, places: Places) -> None:
        self._store = store
        self._places = places

    def recall(self, state: State) -> State:
        """``state`` with what was learned of its models by former supervisors."""
        try:
            document = self._store.load()
        except StateFileError as error:
            log.warning("%s", error)
            return state
        models = dict(state.models)
        for name, record in models.items():
            note = document.get(name)
            if isinstance(note, dict) and note.get("started_as") == self._digest(record):
                residue, awake = _share(note.get("residue")), _share(note.get("awake"))
                models[name] = replace(record, residue=residue, awake=awake)
                if awake is not None:
                    warn_of_claim(record.config, awake)
        return replace(state, models=MappingProxyType(models))

    def published(self, old: State, new: State) -> None:
        if old.models is not new.models and _seen(old) != (seen := _seen(new)):
            document: dict[str, Mapping[str, Any]] = {
                name: {
                    "started_as": self._digest(new.models[name]),
                    "residue": residue,
                    "awake": awake,
                }
                for name, (residue, awake) in seen.items()
            }
            try:
                self._store.save(document)
            except StateFileError as error:
                log.warning("%s", error)

    def switched(self, switch: SwitchFinished) -> None:
        """Nothing to learn."""

    def _digest(self, record: ModelRecord) -> str:
        return launch_digest(record.config, (), self._places)


def _seen(state: State) -> dict[str, tuple[float | None, float | None]]:
    models = state.models.items()
    return {n: (r.residue, r.awake) for n, r in models if (r.residue, r.awake) != (None, None)}


def _share(value: Any) -> float | None:
    return value if isinstance(value, float) and 0 < value <= 1 else None
