"""The core's state: one frozen record per model, one per gateway worker.

Data that is valid only in a state lives in that state's own phase class, not in optional fields.
Times are seconds on the reducer's clock (monotonic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from llmux.config.schema import (
    GPU_RESIDUE,
    Config,
    Eviction,
    ModelConfig,
    Process,
    Weights,
)
from llmux.core.demand.usage import Usage
from llmux.core.demand.workers import NO_DEMAND, Worker, WorkerDemand
from llmux.core.policies.base import PolicyOf, Waiting
from llmux.core.policies.choose import policy_for
from llmux.core.states import ModelState


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
    reason: str = ""  # when neither another model nor an operator asked


@dataclass(frozen=True, slots=True)
class Parking:
    """``released_at``: when its GPU memory was seen gone although the operation goes on: its CUDA
    state is in host memory, and its image is being written."""

    state: ClassVar = ModelState.PARKING
    op: int
    since: float
    eviction: Eviction
    wanted_by: str | None = None
    share: float | None = None  # of each GPU until it is parked; None = as while it served
    released_at: float | None = None


@dataclass(frozen=True, slots=True)
class Parked:
    state: ClassVar = ModelState.PARKED
    eviction: Eviction
    since: float
    reason: str = ""  # why by this eviction, when another was ordered


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
    was_parked: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Not started again before ``until``. ``held``: its processes may still be there and hold
    ``share`` of each of its GPUs. ``was_parked``: they were parked when they could not be ended."""

    state: ClassVar = ModelState.FAILED
    since: float
    until: float
    message: str
    held: bool = False
    share: float = 0.0
    was_parked: bool = False


Phase = Stopped | Starting | Serving | Draining | Parking | Parked | Waking | Stopping | Failed


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """All facts about one model."""

    config: ModelConfig
    phase: Phase = Stopped()
    gpus: tuple[int, ...] = ()  # where it lives or lived last; () = never placed
    eviction_override: Eviction | None = None
    trial: Eviction | None = None  # the engine is started as for this one, while it is validated
    failures: int = 0
    last_active: float = 0.0  # when it last had a request in flight or waiting
    progress: int = 0  # sum over workers, only ever compared
    progress_at: float = 0.0
    bytes_at: float = -math.inf  # the last of an answer; a request that comes is progress, too
    probing: bool = False
    probed_at: float = 0.0
    image: Eviction | None = None  # an image on disk, made by parking like this
    image_bytes: int = 0  # what its image takes there, or took when there was one; 0 = not known
    cut: bool = False  # its last drain ended in a cut: the next one is given its time
    park_request: Eviction | None = None  # an operator's order that waits: coming up, or GPU busy
    parked_bytes: int = 0  # host memory that its engine took when it was last parked there
    keep_alive: float | None = None  # seconds; a request's, in place of the idle timeout
    start_secs: float | None = None  # what its last cold start took
    switched_secs: float = 0.0  # since that: what its returns took for which others made room
    residue: float | None = None  # share of each GPU that a sleep was seen to leave
    awake: float | None = None  # share of each GPU that it was seen to hold when it was up
    overdue_at: float = 0.0  # when the operation under way is taken to hang
    removed: bool = False  # no longer configured: stop, then forget

    @property
    def state(self) -> ModelState:
        return self.phase.state

    @property
    def eviction(self) -> Eviction:
        return self.eviction_override or self.config.eviction

    @property
    def engine(self) -> ModelConfig:
        """How its engine is started: as configured, but for a trial."""
        return self.config if self.trial is None else replace(self.config, eviction=self.trial)

    @property
    def epoch(self) -> str | None:
        return self.phase.epoch if isinstance(self.phase, (Serving, Draining)) else None


@dataclass(frozen=True, slots=True)
class Reservation:
    """A model that waits for room or is being made resident. ``decided_at``: when its first victim
    was sent away, or when it began to wait. ``since``: when it did; ``behind``: models
    that make no room for others and kept it waiting. ``read``: its image was ordered into the page
    cache. ``loading``: so were its weights. ``ahead``: its restore up to the GPU was ordered, and
    is neither taken over nor dropped."""

    decided_at: float
    since: float
    victims: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    read: bool = False
    loading: bool = False
    ahead: bool = False
    drained_at: float | None = None
    room_at: float | None = None
    cold: bool = False


class Waiter(NamedTuple):
    """A model that is waited for, beside what was looked at to say so: while these are the same
    objects, nothing about it has changed."""

    record: ModelRecord
    demand: WorkerDemand
    usage: Usage
    wanted: float | None
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class State:
    """The whole. ``wakeup``: when the next Tick is due, None = only on an event. ``costs``: mean
    seconds of operations by (model, operation); see ``coming`` and ``leaving``. ``pinned``: by the
    mode; ``pins``: model → until when it makes no room for others. ``demands``: of all ``workers``
    together. ``waiters``: who waited at the last decision, for the next one to begin with."""

    config: Config
    gpu_count: int
    epoch_prefix: str
    models: Mapping[str, ModelRecord] = field(default_factory=lambda: MappingProxyType({}))
    workers: Mapping[str, Worker] = field(default_factory=lambda: MappingProxyType({}))
    demands: Mapping[str, WorkerDemand] = field(default_factory=lambda: MappingProxyType({}))
    waiters: Mapping[str, Waiter] = field(default_factory=dict, repr=False, compare=False)
    wants: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    reservations: Mapping[str, Reservation] = field(default_factory=lambda: MappingProxyType({}))
    usage: Mapping[str, Usage] = field(default_factory=lambda: MappingProxyType({}))
    costs: Mapping[tuple[str, str], float] = field(default_factory=lambda: MappingProxyType({}))
    manual: bool = False
    pinned: str | None = None
    memory_short: bool = False  # host memory: the kernel's tasks wait for it
    pins: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    next_op: int = 1
    next_epoch: int = 1
    generation: int = 0
    wakeup: float | None = None
    policy_of: PolicyOf = policy_for

    def waiting(self, model: str) -> int:
        return self.demands.get(model, NO_DEMAND).waiting

    def in_flight(self, model: str) -> int:
        return self.demands.get(model, NO_DEMAND).in_flight

    def oldest_since(self, model: str) -> float | None:
        """When the oldest waiter for the model (operators included) began to wait."""
        return oldest_of(self.demands.get(model, NO_DEMAND), self.wants.get(model))


def oldest_of(demand: WorkerDemand, wanted: float | None) -> float | None:
    """When the oldest waiter began to wait, requests and operators together."""
    oldest = demand.oldest_since if demand.waiting else None
    if oldest is None or wanted is None:
        return wanted if oldest is None else oldest
    return min(oldest, wanted)


def coming(eviction: Eviction | None) -> str:
    """The operation that brings a model back from ``eviction``, in ``State.costs``."""
    return "start" if eviction is None else f"wake from {eviction}"


def leaving(eviction: Eviction) -> str:
    return f"park by {eviction}"


# ---- claims on GPU memory ---------------------------------------------------------------------

ROUNDING = 1e-6


def parked_share(config: ModelConfig, eviction: Eviction, residue: float | None = None) -> float:
    """The share of each GPU that a model keeps while parked by ``eviction``. ``residue``: what a
    sleep was seen to leave there."""
    if eviction.process in (Process.STOP, Process.CHECKPOINT, Process.CUDA_SUSPEND):
        return 0.0
    if config.gpu_memory_parked is not None:
        return config.gpu_memory_parked
    if eviction.weights is Weights.RETAIN:
        return config.gpu_memory
    return min(config.gpu_memory, GPU_RESIDUE if residue is None else residue)


def share_now(record: ModelRecord) -> float:
    """The share of each of its GPUs that the model must be presumed to hold now."""
    match record.phase:
        case Stopped():
            return 0.0
        case Failed(held=held, share=share):
            return share if held else 0.0
        case Parked(eviction=eviction):
            return parked_share(record.config, eviction, record.residue)
        case Parking(eviction=eviction, released_at=released) if released is not None:
            return parked_share(record.config, eviction, record.residue)
        case Stopping(share=share):
            return share
        case Parking(share=float() as share):
            return share
        case _:
            return record.config.gpu_memory


def share_after(record: ModelRecord) -> float:
    """The share that it will hold when its present operation has ended well."""
    match record.phase:
        case Draining(eviction=eviction) | Parking(eviction=eviction):
            return parked_share(record.config, eviction, record.residue)
        case Stopping():
            return 0.0
        case _:
            return share_now(record)


def keeps_gpu(eviction: Eviction) -> bool:
    """Does an engine parked like this keep its GPU memory? Then neither way moves any."""
    return eviction.weights is Weights.RETAIN and eviction.process in (
        Process.KEEP_RUNNING,
        Process.FREEZE,
    )


def moves_memory(record: ModelRecord) -> bool:
    """Is a memory transition under way: a start, wake, park or stop? vLLM's profiling and its
    sleep assertion look at the whole device, so a GPU has one at a time."""
    match record.phase:
        case Starting() | Stopping():
            return True
        case Waking(eviction=eviction):
            return not keeps_gpu(eviction)
        case Parking(eviction=eviction, released_at=released):
            return released is None and not keeps_gpu(eviction)
        case _:
            return False


def goes_into_ram(record: ModelRecord) -> bool:
    """Is the model moving from its GPUs into host memory?"""
    if not isinstance(record.phase, (Draining, Parking)):
        return False
    if isinstance(record.phase, Parking) and record.phase.released_at is not None:
        return False  # it is there already
    eviction = record.phase.eviction
    if eviction.process is Process.STOP or eviction == record.image:  # killed: its image is there
        return False
    if eviction.weights is Weights.RETAIN:
        return eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT)
    return eviction.weights is Weights.OFFLOAD


def is_resident(record: ModelRecord) -> bool:
    """Is it on its GPUs, or coming or going? Models of an exclusive group never are at once."""
    match record.phase:
        case Stopped() | Parked():
            return False
        case Failed(held=held, was_parked=was_parked):
            return held and not was_parked
        case Stopping(was_parked=was_parked):
            return not was_parked
        case Parking(share=share, released_at=released):
            # not one that was parked and goes further down, nor one whose image is being written
            return share is None and released is None
        case _:
            return True


def stays_resident(record: ModelRecord) -> bool:
    """Is it resident and not about to leave?"""
    leaving_now = isinstance(record.phase, (Draining, Parking, Stopping))
    return is_resident(record) and not leaving_now


def frees_memory(config: ModelConfig, eviction: Eviction) -> bool:
    return parked_share(config, eviction) < config.gpu_memory - ROUNDING
