"""Plans are data: what an operation does step by step, with a deadline for each step.

``park_plan`` and ``wake_plan`` mirror each other; the wake plan follows from how the engine *was*
parked, never from today's configuration. A step that fails or overruns ends the plan and its
``fallback`` runs: the ladder whose last rung is the kill of the whole cgroup.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llmux.config.schema import Eviction, ModelConfig, Process, Weights


class StepKind(StrEnum):
    """What a step does; the value is the phase name in metrics and in the journal."""

    SPAWN = "spawn"
    WAIT_HEALTHY = "wait_healthy"
    DESCRIBE = "describe"
    CANARY_RECORD = "canary_record"
    CANARY_CHECK = "canary_check"
    SLEEP = "sleep"
    WAKE_UP = "wake_up"
    RELOAD_WEIGHTS = "reload_weights"
    RESET_PREFIX_CACHE = "reset_prefix_cache"
    FREEZE = "freeze"
    THAW = "thaw"
    COMM_SUSPEND = "comm_suspend"
    COMM_RESUME = "comm_resume"
    CUDA_SUSPEND = "cuda_suspend"
    CUDA_RESUME = "cuda_resume"
    DUMP = "dump"
    RESTORE = "restore"
    TERMINATE = "terminate"
    KILL = "kill"
    VERIFY_RELEASE = "verify_release"


class Outcome(StrEnum):
    """How an operation ended, as observed."""

    UP = "up"  # healthy, verified, may serve
    PARKED = "parked"  # as the plan's eviction says
    DOWN = "down"  # no process left, GPU released
    STUCK = "stuck"  # not even the kill was seen to work: the claim is kept


@dataclass(frozen=True, slots=True)
class Step:
    """``deadline`` in seconds. An optional step's failure is reported and passed over; a step with
    ``if_any`` has nothing to do where there is no CUDA, and must succeed where there is."""

    kind: StepKind
    deadline: float
    level: int = 0
    tags: tuple[str, ...] = ()
    optional: bool = False
    if_any: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """``success``: the outcome when all steps worked. The fallback ends in DOWN or STUCK."""

    name: str  # start, park, wake, stop
    steps: tuple[Step, ...]
    success: Outcome
    eviction: Eviction | None = None
    fallback: tuple[Step, ...] = ()

    @property
    def restores(self) -> bool:
        """Does it bring the processes back from an image?"""
        return any(step.kind is StepKind.RESTORE for step in self.steps)

    @property
    def deadline(self) -> float:
        """The longest this plan can take, in seconds, its fallback included."""
        return sum(step.deadline for step in (*self.steps, *self.fallback))


FREEZE_SECS = 10.0  # measured 1-20 ms for a vLLM tree; a task in uninterruptible sleep delays it
KILL_SECS = 15.0  # cgroup.kill is immediate but for tasks inside the driver or on a slow disk
RELEASE_SECS = 10.0  # the driver frees a killed process's memory within a second or two
# vLLM has unmapped before it says that it sleeps; what is not gone soon will not go by itself
SLEEP_RELEASE_SECS = 3.0
CANARY_SECS = 60.0  # eight tokens; the first request after a start may compile kernels
PROBE_SECS = 30.0
COMM_SECS = 60.0  # NCCL's rendezvous of all ranks
DESCRIBE_SECS = 5.0
SPAWN_SECS = 30.0  # measured 5-40 ms; D-Bus and a busy machine are the rest


# Parked like this an engine keeps its GPU memory: nothing is to be seen going.
KEEPS_GPU = frozenset({(Weights.RETAIN, Process.KEEP_RUNNING), (Weights.RETAIN, Process.FREEZE)})


def _down(model: ModelConfig, *, grace: bool) -> tuple[Step, ...]:
    """End the engine for certain: SIGTERM (where it pays), cgroup kill, see the memory gone."""
    terminate = (Step(StepKind.TERMINATE, model.stop_grace_secs, optional=True),) if grace else ()
    return (
        *terminate,
        Step(StepKind.KILL, KILL_SECS),
        Step(StepKind.VERIFY_RELEASE, RELEASE_SECS),
    )


def start_plan(model: ModelConfig, startup_secs: float) -> Plan:
    """Cold start in a unit of its own."""
    return Plan(
        name="start",
        steps=(
            Step(StepKind.SPAWN, SPAWN_SECS),
            Step(StepKind.WAIT_HEALTHY, startup_secs),
            Step(StepKind.DESCRIBE, DESCRIBE_SECS, optional=True),
            *((Step(StepKind.CANARY_RECORD, CANARY_SECS),) if model.canary else ()),
        ),
        success=Outcome.UP,
        fallback=_down(model, grace=False),
    )


def resume_start_plan(model: ModelConfig, startup_secs: float) -> Plan:
    """The rest of a start that a former supervisor began: the unit is there already."""
    plan = start_plan(model, startup_secs)
    return Plan(plan.name, plan.steps[1:], plan.success, None, plan.fallback)


def stop_plan(model: ModelConfig, *, grace: bool = True) -> Plan:
    """No process left. Without ``grace`` for an engine that died or hangs: it ignores SIGTERM."""
    return Plan("stop", _down(model, grace=grace), Outcome.DOWN)


def _communicators(model: ModelConfig, kind: StepKind) -> list[Step]:
    """Around a CUDA checkpoint of several workers: their shared buffers survive neither way."""
    return [Step(kind, COMM_SECS)] if model.tensor_parallel_size > 1 else []


def reuse_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """Parked by an image that is there already: the processes only have to go."""
    return Plan("park", _down(model, grace=False), Outcome.PARKED, eviction)


def park_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """Weights axis first (vLLM itself), then the process axis on what is left."""
    if eviction.process is Process.STOP:
        return Plan("park", _down(model, grace=True), Outcome.DOWN, eviction)
    steps: list[Step] = []
    if eviction.weights is not Weights.RETAIN:
        level = 1 if eviction.weights is Weights.OFFLOAD else 2
        steps.append(Step(StepKind.SLEEP, model.sleep_timeout_secs, level=level))
    match eviction.process:
        case Process.FREEZE:
            steps.append(Step(StepKind.FREEZE, FREEZE_SECS))
        case Process.CUDA_SUSPEND:
            # the driver's thread in the engine does the work: never on a frozen one
            steps += _communicators(model, StepKind.COMM_SUSPEND)
            steps.append(Step(StepKind.CUDA_SUSPEND, model.sleep_timeout_secs))
            steps.append(Step(StepKind.FREEZE, FREEZE_SECS))
        case Process.CHECKPOINT:
            if eviction.weights is not Weights.RETAIN:
                # prompts in cached blocks have no business on a disk
                steps.append(Step(StepKind.RESET_PREFIX_CACHE, PROBE_SECS, optional=True))
            steps += _communicators(model, StepKind.COMM_SUSPEND)
            steps.append(Step(StepKind.CUDA_SUSPEND, model.sleep_timeout_secs, if_any=True))
            steps.append(Step(StepKind.DUMP, model.checkpoint_timeout_secs))
    if (eviction.weights, eviction.process) not in KEEPS_GPU:
        steps.append(Step(StepKind.VERIFY_RELEASE, SLEEP_RELEASE_SECS))
    return Plan("park", tuple(steps), Outcome.PARKED, eviction, _down(model, grace=True))


def resume_park_plan(
    model: ModelConfig, eviction: Eviction, *, asleep: bool, suspended: bool
) -> Plan:
    """The rest of a park that a former supervisor began. Every step finds out by itself whether it
    is done, but an engine whose CUDA state is in host memory may not answer those before that."""
    plan = park_plan(model, eviction)
    kinds = [step.kind for step in plan.steps]
    done = 0
    if suspended and StepKind.CUDA_SUSPEND in kinds:
        done = kinds.index(StepKind.CUDA_SUSPEND)
    elif asleep and kinds[0] is StepKind.SLEEP:
        done = 1
    return Plan(plan.name, plan.steps[done:], plan.success, plan.eviction, plan.fallback)


def wake_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """The way back from ``eviction``, which is how the engine was parked."""
    steps: list[Step] = []
    match eviction.process:
        case Process.FREEZE:
            steps.append(Step(StepKind.THAW, FREEZE_SECS))
        case Process.CUDA_SUSPEND:
            steps.append(Step(StepKind.THAW, FREEZE_SECS))
            steps.append(Step(StepKind.CUDA_RESUME, model.wake_timeout_secs))
            steps += _communicators(model, StepKind.COMM_RESUME)
        case Process.CHECKPOINT:
            steps.append(Step(StepKind.RESTORE, model.checkpoint_timeout_secs))
            steps.append(Step(StepKind.CUDA_RESUME, model.wake_timeout_secs, if_any=True))
            steps += _communicators(model, StepKind.COMM_RESUME)
    wake = model.wake_timeout_secs
    match eviction.weights:
        case Weights.OFFLOAD:
            steps.append(Step(StepKind.WAKE_UP, wake))
        case Weights.DISCARD:
            # weights first, then the reload, then the KV cache: the other order needs the memory of
            # both at once, and level 2 without a reload answers garbage (vllm#29341, #16564)
            steps += [
                Step(StepKind.WAKE_UP, wake, tags=("weights",)),
                Step(StepKind.RELOAD_WEIGHTS, wake),
                Step(StepKind.WAKE_UP, wake, tags=("kv_cache",)),
                Step(StepKind.RESET_PREFIX_CACHE, PROBE_SECS, optional=True),
            ]
        case Weights.RETAIN:
            pass
    steps.append(Step(StepKind.WAIT_HEALTHY, PROBE_SECS))
    if model.canary:
        steps.append(Step(StepKind.CANARY_CHECK, CANARY_SECS))
    return Plan("wake", tuple(steps), Outcome.UP, eviction, _down(model, grace=False))


def resume_wake_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """The rest of a wake that a former supervisor began, of an engine that is there.

    What it had restored and not verified it had not noted down either (whose CUDA state is in host
    memory, what it answered): once more from the image, whose pids it must not hold meanwhile.
    """
    plan = wake_plan(model, eviction)
    if eviction.process is not Process.CHECKPOINT:
        return plan
    steps = (*_down(model, grace=False), *plan.steps)
    return Plan(plan.name, steps, plan.success, plan.eviction, plan.fallback)
