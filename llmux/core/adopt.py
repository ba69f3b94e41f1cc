"""What a new supervisor makes of the engines that a former one left running.

Pure: observations and the former one's notes in, a legal state and the operations to go on with
out. Observation wins over notes; what was under way is taken up where it was, since every step of
a plan first looks whether it is done already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.effects import Effect
from llmux.core.plans import (
    resume_park_plan,
    resume_start_plan,
    resume_wake_plan,
    stop_plan,
)
from llmux.core.records import (
    ModelRecord,
    Parked,
    Parking,
    Serving,
    Starting,
    State,
    Stopping,
    Waking,
)
from llmux.core.schedule import schedule
from llmux.core.states import ModelState
from llmux.core.turn import Turn

# How an engine that sleeps is parked when nobody wrote it down: the level is unknown, and a reload
# is right after both.
ASLEEP = Eviction(Weights.DISCARD, Process.KEEP_RUNNING)


@dataclass(frozen=True, slots=True)
class Note:
    """What the former supervisor had written down of a model."""

    state: ModelState | None = None
    epoch: str | None = None
    eviction: Eviction | None = None
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """One engine unit as seen now. ``sleeping`` None = it could not be asked. ``suspended``: CUDA
    state of its processes is in host memory. ``half_awake``: it says that it sleeps, and holds more
    GPU memory than that leaves. Both False where that was not asked."""

    model: str
    frozen: bool
    healthy: bool
    sleeping: bool | None
    note: Note = Note()
    suspended: bool = False
    half_awake: bool = False


def placement(config: ModelConfig, note: Note) -> tuple[int, ...]:
    """The GPUs that the engine is on."""
    configured = config.gpus
    placed = configured if isinstance(configured, tuple) else tuple(range(configured))
    return note.gpus or placed


def adopt(
    state: State, observations: Iterable[Observation], images: Mapping[str, Eviction], now: float
) -> tuple[State, tuple[Effect, ...]]:
    """``state`` is the initial one; models without an observation stay stopped. ``images``: how
    the models that have an image on disk were parked when it was made."""
    turn = Turn(state, now)
    for name, eviction in images.items():
        if name in turn.models:
            turn.update(name, image=eviction)
    for observation in observations:
        _adopt_one(turn, observation)
    schedule(turn)
    return turn.finish()


def _adopt_one(turn: Turn, seen: Observation) -> None:
    name, note = seen.model, seen.note
    record = turn.models.get(name)
    if record is None:
        # an engine of a model that is configured no longer
        turn.models[name] = ModelRecord(config=ModelConfig(name, "-"), removed=True)
        _begin_stop(turn, name, "the model was removed from the configuration")
        return
    gpus = placement(record.config, note)
    turn.update(name, gpus=gpus, last_active=turn.now, progress_at=turn.now)
    eviction = note.eviction or record.eviction
    match note.state:
        case ModelState.STARTING:
            _begin_start(turn, name)
        case ModelState.PARKING if seen.frozen:
            # the freezer comes last, and a frozen engine answers no /sleep
            turn.update(name, phase=Parked(eviction, turn.now))
        case ModelState.PARKING:
            op = turn.operation()
            turn.update(name, phase=Parking(op, turn.now, eviction))
            asleep = seen.sleeping is True
            turn.run(
                name,
                op,
                resume_park_plan(record.config, eviction, asleep=asleep, suspended=seen.suspended),
            )
        case ModelState.WAKING:
            op = turn.operation()
            turn.update(name, phase=Waking(op, turn.now, eviction))
            turn.run(name, op, resume_wake_plan(record.config, eviction))
        case ModelState.STOPPING | ModelState.FAILED | ModelState.STOPPED:
            _begin_stop(turn, name, "it was being stopped when the supervisor ended")
        case ModelState.PARKED if note.eviction is not None:
            turn.update(name, phase=Parked(note.eviction, turn.now))
        case _:
            _adopt_resting(turn, seen)


def _adopt_resting(turn: Turn, seen: Observation) -> None:
    """Serving, draining, or no note at all: believe what is seen."""
    name, note = seen.model, seen.note
    if seen.frozen or seen.suspended:
        # whether it sleeps cannot be asked of it as it is: the configuration says whether it
        # can; the level is unknown, and a reload is right after both
        configured = turn.models[name].eviction.weights
        if note.eviction is not None:
            weights = note.eviction.weights
        else:
            weights = Weights.RETAIN if configured is Weights.RETAIN else Weights.DISCARD
        process = Process.CUDA_SUSPEND if seen.suspended else Process.FREEZE
        turn.update(name, phase=Parked(Eviction(weights, process), turn.now))
    elif seen.half_awake:
        # a wake was under way; vLLM goes neither back from there nor says how far it has come
        _begin_stop(turn, name, "it was being woken, and nobody knows how far that has come")
    elif seen.sleeping:
        turn.update(name, phase=Parked(ASLEEP, turn.now))
    elif note.state in (ModelState.SERVING, ModelState.DRAINING) or seen.healthy:
        # an epoch that was revoked must not be granted again: its "drained" may be on its way
        keep = note.epoch if note.state is ModelState.SERVING else None
        turn.update(name, phase=Serving(keep or turn.epoch(), turn.now))
        if not seen.healthy:
            turn.suspect(name)
    else:
        _begin_start(turn, name)


def _begin_start(turn: Turn, name: str) -> None:
    record = turn.models[name]
    op = turn.operation()
    turn.update(name, phase=Starting(op, turn.now, "adopted while starting"))
    startup = turn.config.startup_timeout(record.config)
    turn.run(name, op, resume_start_plan(record.config, startup))


def _begin_stop(turn: Turn, name: str, reason: str) -> None:
    op = turn.operation()
    config = turn.models[name].config
    turn.update(name, phase=Stopping(op, turn.now, reason, config.gpu_memory))
    turn.run(name, op, stop_plan(config))
