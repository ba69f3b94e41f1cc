"""The states of a model and the legal transitions between them, as data.

From ``TRANSITIONS`` come the run-time check, a test over every pair and the diagram in
ARCHITECTURE.md. The value of a state is the word used in the API, the journal and the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class ModelState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    PARKING = "parking"
    PARKED = "parked"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"


_S = ModelState

TRANSITIONS: Final[Mapping[ModelState, frozenset[ModelState]]] = MappingProxyType(
    {
        # waking: from an image on disk
        _S.STOPPED: frozenset({_S.STARTING, _S.WAKING}),
        # a start that failed is cleaned up by its own plan: down = failed, stuck = failed and held
        # stopping: the start is not wanted any more
        _S.STARTING: frozenset({_S.SERVING, _S.STOPPING, _S.FAILED}),
        # stopping straight from serving: the engine died or hung, and its unit is cleaned up
        _S.SERVING: frozenset({_S.DRAINING, _S.STOPPING}),
        # back to serving when the room is not wanted any more
        _S.DRAINING: frozenset({_S.SERVING, _S.PARKING, _S.STOPPING}),
        # stopped: the process axis was `stop`, or the ladder ended there
        _S.PARKING: frozenset({_S.PARKED, _S.STOPPED, _S.FAILED}),
        # parking: further down the ladder, out of host memory
        _S.PARKED: frozenset({_S.WAKING, _S.PARKING, _S.STOPPING}),
        # starting: the wake failed, was cleaned up, and the same waiters get a cold start;
        # stopped: as before, but the cold start has to wait for another model's transition
        # stopping: the wake is not wanted any more
        _S.WAKING: frozenset({_S.SERVING, _S.STARTING, _S.STOPPING, _S.STOPPED, _S.FAILED}),
        _S.STOPPING: frozenset({_S.STOPPED, _S.FAILED}),
        # stopping: a stuck engine is tried again
        _S.FAILED: frozenset({_S.STARTING, _S.WAKING, _S.STOPPED, _S.STOPPING}),
    }
)

# The engine's process tree exists (or must be presumed to).
ALIVE: Final = frozenset(set(ModelState) - {_S.STOPPED, _S.FAILED})
# Between two resting states: an operation runs, or requests are being drained.
MOVING: Final = frozenset({_S.STARTING, _S.DRAINING, _S.PARKING, _S.WAKING, _S.STOPPING})


def diagram() -> str:
    """The state diagram in Mermaid's notation, for ARCHITECTURE.md."""
    lines = ["stateDiagram-v2", "    [*] --> stopped"]
    for state in ModelState:
        lines += [f"    {state} --> {to}" for to in ModelState if to in TRANSITIONS[state]]
    return "\n".join(lines)
