"""What can happen. Frozen values; every one is handed to the reducer together with the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmux.config.schema import Config, Eviction
from llmux.core.plans import Outcome


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A gateway worker connected, perhaps again; ``holds``: model → the epoch it still holds."""

    worker: str
    holds: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """Its process has ended, and its requests with it (or it has been away too long to wait)."""

    worker: str


@dataclass(frozen=True, slots=True)
class DemandChanged:
    """One worker's aggregate for one model; ``oldest_age`` in seconds."""

    worker: str
    model: str
    waiting: int
    oldest_age: float | None
    in_flight: int
    progress: int


@dataclass(frozen=True, slots=True)
class WorkerDrained:
    worker: str
    model: str
    epoch: str


@dataclass(frozen=True, slots=True)
class EngineSuspect:
    """Somebody could not talk to the engine that serves on ``epoch``."""

    model: str
    epoch: str
    error: str


@dataclass(frozen=True, slots=True)
class ProbeFinished:
    model: str
    epoch: str
    error: str | None  # None: it answered


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The root process of the model's unit ended while no operation was running on it."""

    model: str
    description: str


@dataclass(frozen=True, slots=True)
class OperationFinished:
    """An operation ended. ``detail`` says why when the outcome is not the plan's success."""

    model: str
    op: int
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ImageKnown:
    """There is (None: is no longer) an image to restore the model from, made by ``eviction``."""

    model: str
    eviction: Eviction | None


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """An operator wants the model resident although nobody waits for it."""

    model: str


@dataclass(frozen=True, slots=True)
class ParkAsked:
    """An operator wants the model parked (or stopped) now; None = by its own eviction."""

    model: str
    eviction: Eviction | None = None


@dataclass(frozen=True, slots=True)
class EvictionSet:
    """Run-time override of a model's eviction; None takes it back."""

    model: str
    eviction: Eviction | None


@dataclass(frozen=True, slots=True)
class ModeSet:
    """Manual mode lets only operators move models; ``pinned`` is never a victim."""

    manual: bool
    pinned: str | None = None


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    config: Config


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``State.wakeup`` asked for has come."""


Event = (
    WorkerJoined
    | WorkerLeft
    | DemandChanged
    | WorkerDrained
    | EngineSuspect
    | ProbeFinished
    | EngineExited
    | OperationFinished
    | ImageKnown
    | LoadAsked
    | ParkAsked
    | EvictionSet
    | ModeSet
    | ConfigChanged
    | Tick
)
