"""What a new supervisor makes of the engines that a former one left running.

Pure: observations and the former supervisor's notes in; a legal state and the operations to go on
with out. Observation wins over notes. An operation that was under way is resumed: every step of a
plan first looks whether it is done already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.effects import Effect
from llmux.core.events import ImageKnown
from llmux.core.plans import (
    resume_park_plan,
    resume_start_plan,
    resume_wake_plan,
    stop_plan,
)
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Serving,
    Starting,
    State,
    Stopping,
    Waking,
)
from llmux.core.room import Room
from llmux.core.schedule import schedule
from llmux.core.states import ModelState
from llmux.core.transaction import Transaction

# How an engine that sleeps is parked when no note says so: the level is unknown, and a reload is
# right after both.
ASLEEP = Eviction(Weights.DISCARD, Process.KEEP_RUNNING)


@dataclass(frozen=True, slots=True)
class Note:
    """What the former supervisor had written down of a model."""

    state: ModelState | None = None
    epoch: str | None = None
    eviction: Eviction | None = None
    gpus: tuple[int, ...] = ()
    since: float | None = None  # when that state began
    until: float | None = None  # of a failed model: when it may be tried again
    message: str = ""  # why it failed
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """One engine unit as seen now. ``sleeping`` None = it could not be asked. ``suspended``: CUDA
    state of its processes is in host memory. ``half_awake``: it says that it sleeps, and holds more
    GPU memory than that leaves. Both False where that was not asked. ``stranger``: another process
    listens where it should."""

    model: str
    frozen: bool
    healthy: bool
    sleeping: bool | None
    note: Note = Note()
    suspended: bool = False
    half_awake: bool = False
    stranger: bool = False


def placement(config: ModelConfig, note: Note) -> tuple[int, ...]:
    """The GPUs that the engine is on."""
    configured = config.gpus
    placed = configured if isinstance(configured, tuple) else tuple(range(configured))
    return note.gpus or placed


def adopt(
    state: State,
    observations: Iterable[Observation],
    images: Iterable[ImageKnown],
    now: float,
    notes: Mapping[str, Note] = MappingProxyType({}),
) -> tuple[State, tuple[Effect, ...]]:
    """``state`` is the initial one; models without an observation stay stopped, or failed when
    their note of ``notes`` says so. ``images``: those on disk."""
    tx = Transaction(state, now)
    for image in images:
        if (record := tx.models.get(image.model)) is not None:
            tx.put(replace(record, image=image.eviction, image_bytes=image.disk_bytes))
    observed = list(observations)
    for name, note in notes.items():
        if name in tx.models:
            _remember_failures(tx, name, note)
    for observation in observed:
        _adopt_one(tx, observation)
    if not observed:
        _preload(tx)
    schedule(tx)
    return tx.finish()


def _remember_failures(tx: Transaction, name: str, note: Note) -> None:
    """A model that backs off goes on doing so, and its reason can still be read. One whose engine
    is there gets the state that this was found in."""
    tx.put(replace(tx.models[name], failures=note.failures))
    if note.state is ModelState.FAILED:
        began = _began(note, tx.now)
        longest = tx.now + tx.config.policy.backoff_max_secs
        tx.found(name, Failed(began, min(note.until or tx.now, longest), note.message))


def _began(note: Note, now: float) -> float:
    """When the state began that goes on; never in the future, whatever the note says."""
    return now if note.since is None else min(note.since, now)


def _preload(tx: Transaction) -> None:
    """Of the models to be resident from the start those that fit together, in the order given."""
    room = Room(tx.models, tx.base.gpu_count, tx.config.exclusive)
    for name in tx.config.preload:
        record = tx.models[name]
        gpus, share = room.place(record), record.config.gpu_memory
        if gpus is not None and room.fits_after(name, gpus, share):
            tx.want(name)
            room.reserve(name, gpus, share)


def _adopt_one(tx: Transaction, seen: Observation) -> None:
    name, note = seen.model, seen.note
    record = tx.models.get(name)
    if record is None:
        # an engine of a model that is configured no longer
        tx.add(ModelRecord(config=ModelConfig(name, "-"), removed=True))
        _begin_stop(tx, name, "the model was removed from the configuration")
        return
    gpus = placement(record.config, note)
    tx.put(replace(record, gpus=gpus, last_active=tx.now, progress_at=tx.now))
    eviction = note.eviction or record.eviction
    if seen.stranger:
        _begin_stop(tx, name, "another process listens at its address")
        return
    match note.state:
        case ModelState.STARTING:
            _begin_start(tx, name)
        case ModelState.PARKING if seen.frozen:
            # the freezer comes last, and a frozen engine answers no /sleep
            tx.found(name, Parked(eviction, tx.now))
        case ModelState.PARKING:
            op = tx.operation()
            tx.found(name, Parking(op, tx.now, eviction))
            asleep = seen.sleeping is True
            tx.run(
                name,
                op,
                resume_park_plan(record.config, eviction, asleep=asleep, suspended=seen.suspended),
            )
        case ModelState.WAKING:
            op = tx.operation()
            tx.found(name, Waking(op, tx.now, eviction))
            tx.run(name, op, resume_wake_plan(record.config, eviction))
        case ModelState.STOPPING | ModelState.FAILED | ModelState.STOPPED:
            _begin_stop(tx, name, "it was being stopped when the supervisor ended")
        case ModelState.PARKED if note.eviction is not None:
            tx.found(name, Parked(note.eviction, _began(note, tx.now)))
        case _:
            _adopt_resting(tx, seen)


def _adopt_resting(tx: Transaction, seen: Observation) -> None:
    """Serving, draining, or no note at all: believe what is seen."""
    name, note = seen.model, seen.note
    if seen.frozen or seen.suspended:
        # as it is it cannot say whether it sleeps: the configuration says whether it
        # can; the level is unknown, and a reload is right after both
        configured = tx.models[name].eviction.weights
        if note.eviction is not None:
            weights = note.eviction.weights
        else:
            weights = Weights.RETAIN if configured is Weights.RETAIN else Weights.DISCARD
        process = Process.CUDA_SUSPEND if seen.suspended else Process.FREEZE
        tx.found(name, Parked(Eviction(weights, process), tx.now))
    elif seen.half_awake:
        # a wake was under way: an engine can neither undo a partial wake nor report progress
        _begin_stop(tx, name, "it was being woken, and cannot say how far it has come")
    elif seen.sleeping:
        tx.found(name, Parked(ASLEEP, tx.now))
    elif note.state in (ModelState.SERVING, ModelState.DRAINING) or seen.healthy:
        # an epoch that was revoked must not be granted again: its "drained" may be on its way
        keep = note.epoch if note.state is ModelState.SERVING else None
        began = _began(note, tx.now) if note.state is ModelState.SERVING else tx.now
        tx.found(name, Serving(keep or tx.epoch(), began))
        if not seen.healthy:
            tx.suspect(name)
    else:
        _begin_start(tx, name)


def _begin_start(tx: Transaction, name: str) -> None:
    record = tx.models[name]
    op = tx.operation()
    tx.found(name, Starting(op, tx.now, "adopted while starting"))
    startup = tx.config.startup_timeout(record.config)
    tx.run(name, op, resume_start_plan(record.config, startup))


def _begin_stop(tx: Transaction, name: str, reason: str) -> None:
    op = tx.operation()
    config = tx.models[name].config
    tx.found(name, Stopping(op, tx.now, reason, config.gpu_memory))
    tx.run(name, op, stop_plan(config))
