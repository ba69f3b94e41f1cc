"""What can happen. Frozen values; the reducer is given the time with each."""

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
    """Its process has ended, and its requests with it, or it did not reconnect in time."""

    worker: str


@dataclass(frozen=True, slots=True)
class DemandChanged:
    """One worker's aggregate for one model. ``oldest_since``: when the oldest waiter began to wait,
    on the reducer's clock, computed when the message arrived: it may be handled later.
    ``completed`` counts requests that ended well since the worker started, ``repeated`` those that
    were in flight when the last engine died, until one ends well and none is suspected."""

    worker: str
    model: str
    waiting: int
    oldest_since: float | None
    in_flight: int
    progress: int
    completed: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class WorkerDrained:
    worker: str
    model: str
    epoch: str


@dataclass(frozen=True, slots=True)
class EngineSuspect:
    """A worker could not talk to the engine that serves on ``epoch``."""

    model: str
    epoch: str
    error: str


@dataclass(frozen=True, slots=True)
class ProbeFinished:
    model: str
    epoch: str
    error: str | None  # None: it lives
    stalled: bool = False  # asked because of requests without a byte, not of a broken connection


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The root process of the model's unit ended while no operation was running on it."""

    model: str
    description: str


@dataclass(frozen=True, slots=True)
class OperationFinished:
    """An operation ended. ``detail`` says why when the outcome is not the plan's success, and why
    the engine is parked by ``eviction`` when the plan's eviction was another."""

    model: str
    op: int
    outcome: Outcome
    detail: str = ""
    eviction: Eviction | None = None
    host_bytes: int | None = None  # that the parked engine takes; None = not known


@dataclass(frozen=True, slots=True)
class GpuReleased:
    """The GPU memory of the model was seen gone while its operation goes on without a GPU."""

    model: str
    op: int


@dataclass(frozen=True, slots=True)
class ResidueSeen:
    """The share of each of its GPUs that the model still holds although it sleeps."""

    model: str
    op: int
    share: float


@dataclass(frozen=True, slots=True)
class AwakeSeen:
    """The share of each of its GPUs that the model holds when it is up."""

    model: str
    op: int
    share: float


@dataclass(frozen=True, slots=True)
class ImageKnown:
    """There is (None: is no longer) an image to restore the model from, made by ``eviction``.
    ``disk_bytes``: what it takes; 0 where that was not looked at."""

    model: str
    eviction: Eviction | None
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """An operator wants the model resident although no request waits for it. ``order`` numbers it
    for the answer, OrderAnswered; None: no answer is needed."""

    model: str
    order: int | None = None


@dataclass(frozen=True, slots=True)
class ParkAsked:
    """An operator wants the model parked (or stopped) now; None = by its own eviction."""

    model: str
    eviction: Eviction | None = None
    order: int | None = None


@dataclass(frozen=True, slots=True)
class LoadWithdrawn:
    """No operator wants the model resident any more. A start that is under way goes on."""

    model: str


@dataclass(frozen=True, slots=True)
class ParkWithdrawn:
    """The operator's order to park the model is withdrawn, as far as it has not begun."""

    model: str


@dataclass(frozen=True, slots=True)
class EvictionSet:
    """Run-time override of a model's eviction; None removes it."""

    model: str
    eviction: Eviction | None


@dataclass(frozen=True, slots=True)
class TrialSet:
    """Start the model's engine as for ``eviction``, whatever is configured; None ends the trial."""

    model: str
    eviction: Eviction | None


@dataclass(frozen=True, slots=True)
class ModeSet:
    """Manual mode lets only operators move models; ``pinned`` is never a victim."""

    manual: bool
    pinned: str | None = None


@dataclass(frozen=True, slots=True)
class PinSet:
    """The model makes no room for others until ``until`` on the reducer's clock; math.inf: until it
    is unpinned. None: unpin it. Independent of the mode; several models may be pinned."""

    model: str
    until: float | None


@dataclass(frozen=True, slots=True)
class KeepAliveSet:
    """A request says after how many seconds without use its model may be parked, in place of what
    is configured; math.inf: never for that."""

    model: str
    seconds: float


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """Host memory became short, or is no longer."""

    short: bool


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    config: Config


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``State``'s wakeup names has come."""


Event = (
    WorkerJoined
    | WorkerLeft
    | DemandChanged
    | WorkerDrained
    | EngineSuspect
    | ProbeFinished
    | EngineExited
    | OperationFinished
    | GpuReleased
    | ResidueSeen
    | AwakeSeen
    | ImageKnown
    | LoadAsked
    | ParkAsked
    | LoadWithdrawn
    | ParkWithdrawn
    | EvictionSet
    | TrialSet
    | ModeSet
    | PinSet
    | KeepAliveSet
    | MemoryPressure
    | ConfigChanged
    | Tick
)
