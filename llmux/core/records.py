"""The core's state: one frozen record per model, one per gateway worker.

Data that is valid only in a state lives in that state's own phase class, not in optional fields.
Times are seconds on the clock of whoever calls the reducer (monotonic).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from llmux.config.schema import (
    GPU_RESIDUE,
    Config,
    Eviction,
    ModelConfig,
    Process,
    Weights,
)
from llmux.core.states import ModelState

EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Stopped:
    state: ClassVar = ModelState.STOPPED
    since: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Starting:
    state: ClassVar = ModelState.STARTING
    op: int
    since: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    state: ClassVar = ModelState.SERVING
    epoch: str
    since: float


@dataclass(frozen=True, slots=True)
class Draining:
    """``wanted_by``: the model that needs the room; None = an operator asked."""

    state: ClassVar = ModelState.DRAINING
    epoch: str
    serving_since: float
    since: float
    deadline: float
    eviction: Eviction
    wanted_by: str | None
    cut_at: float | None = None


@dataclass(frozen=True, slots=True)
class Parking:
    state: ClassVar = ModelState.PARKING
    op: int
    since: float
    eviction: Eviction
    wanted_by: str | None = None


@dataclass(frozen=True, slots=True)
class Parked:
    state: ClassVar = ModelState.PARKED
    eviction: Eviction
    since: float


@dataclass(frozen=True, slots=True)
class Waking:
    state: ClassVar = ModelState.WAKING
    op: int
    since: float
    eviction: Eviction


@dataclass(frozen=True, slots=True)
class Stopping:
    """``reason`` is kept for what follows: the journal line and, after a crash, the refusal.
    ``share``: what it holds of each GPU until it is gone; a parked engine holds little."""

    state: ClassVar = ModelState.STOPPING
    op: int
    since: float
    reason: str
    share: float
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Not started again before ``until``. ``held``: its processes may still hold GPU memory."""

    state: ClassVar = ModelState.FAILED
    since: float
    until: float
    message: str
    held: bool = False


Phase = Stopped | Starting | Serving | Draining | Parking | Parked | Waking | Stopping | Failed


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """Everything the core knows of one model."""

    config: ModelConfig
    phase: Phase = Stopped()
    gpus: tuple[int, ...] = ()  # where it lives or lived last; () = never placed
    eviction_override: Eviction | None = None
    failures: int = 0
    last_active: float = 0.0  # when it last had a request in flight or waiting
    progress: int = 0  # sum over workers, only ever compared
    progress_at: float = 0.0
    probing: bool = False
    image: Eviction | None = None  # an image on disk, made by parking like this
    park_request: Eviction | None = None  # asked for while it was coming up
    removed: bool = False  # no longer configured: stop, then forget

    @property
    def state(self) -> ModelState:
        return self.phase.state

    @property
    def eviction(self) -> Eviction:
        return self.eviction_override or self.config.eviction

    @property
    def epoch(self) -> str | None:
        return self.phase.epoch if isinstance(self.phase, (Serving, Draining)) else None


@dataclass(frozen=True, slots=True)
class WorkerDemand:
    waiting: int = 0
    oldest_since: float | None = None
    in_flight: int = 0
    progress: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """A connected gateway worker. ``holds`` is what it may still have requests on."""

    holds: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    demands: Mapping[str, WorkerDemand] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Reservation:
    """A model that is being made resident: since when, and at whose cost. ``ahead``: what of its
    restore needs no GPU was ordered, and neither taken over by a wake nor dropped."""

    decided_at: float
    victims: tuple[str, ...] = ()
    ahead: bool = False
    drained_at: float | None = None
    room_at: float | None = None
    cold: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """The whole. ``wakeup`` is when the next Tick is due, None = only on an event."""

    config: Config
    gpu_count: int
    epoch_prefix: str
    models: Mapping[str, ModelRecord] = field(default_factory=lambda: MappingProxyType({}))
    workers: Mapping[str, Worker] = field(default_factory=lambda: MappingProxyType({}))
    wants: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    reservations: Mapping[str, Reservation] = field(default_factory=lambda: MappingProxyType({}))
    costs: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    manual: bool = False
    pinned: str | None = None
    next_op: int = 1
    next_epoch: int = 1
    generation: int = 0
    wakeup: float | None = None

    def waiting(self, model: str) -> int:
        return sum(w.demands[model].waiting for w in self.workers.values() if model in w.demands)

    def in_flight(self, model: str) -> int:
        return sum(w.demands[model].in_flight for w in self.workers.values() if model in w.demands)

    def oldest_since(self, model: str) -> float | None:
        """When the oldest of those that wait for the model (operators included) began to."""
        times = [
            demand.oldest_since
            for worker in self.workers.values()
            if (demand := worker.demands.get(model)) and demand.waiting
            if demand.oldest_since is not None
        ]
        if model in self.wants:
            times.append(self.wants[model])
        return min(times, default=None)


# ---- claims on GPU memory ---------------------------------------------------------------------

ROUNDING = 1e-6


def parked_share(config: ModelConfig, eviction: Eviction) -> float:
    """The share of each GPU that a model keeps while parked by ``eviction``."""
    if eviction.process in (Process.STOP, Process.CHECKPOINT, Process.CUDA_SUSPEND):
        return 0.0
    if config.gpu_memory_parked is not None:
        return config.gpu_memory_parked
    return config.gpu_memory if eviction.weights is Weights.RETAIN else GPU_RESIDUE


def share_now(record: ModelRecord) -> float:
    """What the model must be presumed to hold on each of its GPUs now."""
    match record.phase:
        case Stopped():
            return 0.0
        case Failed(held=held):
            return record.config.gpu_memory if held else 0.0
        case Parked(eviction=eviction):
            return parked_share(record.config, eviction)
        case Stopping(share=share):
            return share
        case _:
            return record.config.gpu_memory


def share_after(record: ModelRecord) -> float:
    """What it will hold when what is under way has ended well."""
    match record.phase:
        case Draining(eviction=eviction) | Parking(eviction=eviction):
            return parked_share(record.config, eviction)
        case Stopping():
            return 0.0
        case _:
            return share_now(record)


def goes_into_ram(record: ModelRecord) -> bool:
    """Is it leaving, and what it holds on its GPUs going into host memory?"""
    if not isinstance(record.phase, (Draining, Parking)):
        return False
    eviction = record.phase.eviction
    if eviction.process is Process.STOP or eviction == record.image:  # killed: its image is there
        return False
    if eviction.weights is Weights.RETAIN:
        return eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT)
    return eviction.weights is Weights.OFFLOAD


def frees_memory(config: ModelConfig, eviction: Eviction) -> bool:
    return parked_share(config, eviction) < config.gpu_memory - ROUNDING
