"""Plans are data: what an operation does step by step, with a deadline for each step.

``park_plan`` and ``wake_plan`` mirror each other; the wake plan follows from how the engine *was*
parked, never from today's configuration. A step that fails or overruns ends the plan and its
``fallback`` runs: the ladder whose last rung is the kill of the whole cgroup.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from llmux.config.schema import Eviction, ModelConfig, Process, Weights
from llmux.core.records import keeps_gpu
from llmux.engines.engine_type import WakeStage
from llmux.engines.parking import SUSPENDING


class StepKind(StrEnum):
    """What a step does; the value is the phase name in metrics and in the journal."""

    SPAWN = "spawn"
    WAIT_HEALTHY = "wait_healthy"
    DESCRIBE = "describe"
    CANARY_RECORD = "canary_record"
    CANARY_SAMPLE = "canary_sample"
    CANARY_CHECK = "canary_check"
    SLEEP = "sleep"
    WAKE_UP = "wake_up"
    RELOAD_WEIGHTS = "reload_weights"
    RESET_PREFIX_CACHE = "reset_prefix_cache"
    FREEZE = "freeze"
    THAW = "thaw"
    DISCARD_CACHE = "discard_cache"
    RETURN_CACHE = "return_cache"
    COMM_SUSPEND = "comm_suspend"
    COMM_RESUME = "comm_resume"
    CUDA_SUSPEND = "cuda_suspend"
    CUDA_RESUME = "cuda_resume"
    LEAVE_CLAIM = "leave_claim"
    DUMP = "dump"
    RESTORE = "restore"
    TERMINATE = "terminate"
    LEAVE_GPU = "leave_gpu"
    KILL = "kill"
    VERIFY_RELEASE = "verify_release"


class Outcome(StrEnum):
    """How an operation ended, as observed."""

    UP = "up"  # healthy, verified, may serve
    PARKED = "parked"  # as the plan's eviction says
    DOWN = "down"  # no process left, GPU released
    STUCK = "stuck"  # not even the kill was seen to work: the claim is kept


class PlanKind(StrEnum):
    """What an operation is for; the value is the word in the journal."""

    START = "start"
    PARK = "park"
    WAKE = "wake"
    STOP = "stop"


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
    """``success``: the outcome when all steps worked. ``fallback``: the last rung, run when one did
    not; it ends in DOWN or STUCK. ``eviction``: how the engine is, or was, parked."""

    kind: PlanKind
    steps: tuple[Step, ...]
    success: Outcome
    fallback: tuple[Step, ...]
    eviction: Eviction | None = None

    @property
    def restores(self) -> bool:
        """Does it bring the processes back from an image?"""
        return any(step.kind is StepKind.RESTORE for step in self.steps)

    @property
    def dumps(self) -> bool:
        """Does it make an image?"""
        return any(step.kind is StepKind.DUMP for step in self.steps)

    @property
    def deadline(self) -> float:
        """The longest this plan can take, in seconds, its fallback included."""
        return sum(step.deadline for step in (*self.steps, *self.fallback))


FREEZE_SECS = 10.0  # measured 1-20 ms; a task in uninterruptible sleep delays it
# A resumed engine is suspended again before it ends: killed with its CUDA state on the GPU it may
# hang the host (cuda-checkpoint#53). An H200 moved 6 GiB to host memory in 3.4 s. One that may hang
# is not waited for as long as one that is well.
LEAVE_GPU_SECS = 30.0
KILL_SECS = 15.0  # cgroup.kill is immediate but for tasks inside the driver or on a slow disk
RELEASE_SECS = 10.0  # the driver frees a killed process's memory within a second or two
# an engine has unmapped before it says that it sleeps; what is not gone soon stays
SLEEP_RELEASE_SECS = 3.0
CANARY_SECS = 60.0  # eight tokens; the first request after a start may compile kernels
# Kernels for sampling may be compiled at the first request that samples: minutes with nvcc.
SAMPLE_SECS = 300.0
PROBE_SECS = 30.0
COMM_SECS = 60.0  # NCCL's rendezvous of all ranks
DESCRIBE_SECS = 5.0
SPAWN_SECS = 30.0  # measured 5-40 ms; D-Bus and a busy machine are the rest


def _down(model: ModelConfig, *, grace: bool, well: bool = False) -> tuple[Step, ...]:
    """End the engine for certain: off the GPU if it was resumed, SIGTERM (where it pays), cgroup
    kill, see the memory gone. ``well``: nothing failed before, so that it answers. Then it leaves
    the GPU asleep, its weights discarded: else they are copied to host memory for nothing, seconds
    while the next model waits, and there may be no room for them."""
    terminate = (Step(StepKind.TERMINATE, model.stop_grace_secs, optional=True),) if grace else ()
    sleeps = well and any(rung.weights is not Weights.RETAIN for rung in model.rungs)
    level = model.engine_type.sleep_levels[Weights.DISCARD] if sleeps else 0
    patience = max(LEAVE_GPU_SECS, model.sleep_timeout_secs) if well else LEAVE_GPU_SECS
    return (
        Step(StepKind.LEAVE_GPU, patience, level=level, optional=True),
        *terminate,
        Step(StepKind.KILL, KILL_SECS),
        Step(StepKind.VERIFY_RELEASE, RELEASE_SECS),
    )


def start_plan(model: ModelConfig, startup_secs: float) -> Plan:
    """Cold start in a unit of its own."""
    return Plan(
        kind=PlanKind.START,
        steps=(
            Step(StepKind.SPAWN, SPAWN_SECS),
            Step(StepKind.WAIT_HEALTHY, startup_secs),
            Step(StepKind.DESCRIBE, DESCRIBE_SECS, optional=True),
            *(_canaries() if model.canary else ()),
        ),
        success=Outcome.UP,
        fallback=_down(model, grace=False),
    )


def resume_start_plan(model: ModelConfig, startup_secs: float) -> Plan:
    """The rest of a start that a former supervisor began: the unit is there already."""
    plan = start_plan(model, startup_secs)
    return replace(plan, steps=plan.steps[1:])


def _canaries() -> tuple[Step, ...]:
    """What a wake is compared with; then, once, what an engine good at the first may die of: a
    compiler that is missing shows at the first request that samples, a client's otherwise."""
    return (
        Step(StepKind.CANARY_RECORD, CANARY_SECS),
        Step(StepKind.CANARY_SAMPLE, SAMPLE_SECS),
    )


def stop_plan(model: ModelConfig, *, grace: bool = True) -> Plan:
    """No process left. Without ``grace`` for an engine that died or hangs: it ignores SIGTERM."""
    steps = _down(model, grace=grace, well=grace)
    return Plan(PlanKind.STOP, steps, Outcome.DOWN, _down(model, grace=False))


def _communicators(model: ModelConfig, kind: StepKind) -> list[Step]:
    """Around a CUDA checkpoint of several workers: their shared buffers survive neither way."""
    return [Step(kind, COMM_SECS)] if model.ranks > 1 else []


def reuse_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """Parked by an image that is there already: the processes only have to go."""
    down, last = _down(model, grace=False, well=True), _down(model, grace=False)
    return Plan(PlanKind.PARK, down, Outcome.PARKED, last, eviction)


def park_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """Weights axis first (the engine itself), then the process axis on what is left.

    A model that cannot be parked so is stopped: its configuration may have changed since.
    """
    if eviction.process is Process.STOP or model.parking_obstacle(eviction):
        down, last = _down(model, grace=True, well=True), _down(model, grace=False)
        return Plan(PlanKind.PARK, down, Outcome.DOWN, last, eviction)
    steps: list[Step] = []
    if _retains_suspended(eviction):
        if model.engine_type.cache_apart(model.extra_args):
            # its blocks are of no use to anybody, and up to nine tenths of what would be saved
            steps.append(Step(StepKind.DISCARD_CACHE, PROBE_SECS, optional=True))
    elif eviction.weights is not Weights.RETAIN:
        level = model.engine_type.sleep_levels[eviction.weights]
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
            # the next model need not wait for the disk; without it the last step decides
            steps.append(Step(StepKind.LEAVE_CLAIM, SLEEP_RELEASE_SECS, optional=True))
            steps.append(Step(StepKind.DUMP, model.checkpoint_timeout_secs))
    if not keeps_gpu(eviction):
        steps.append(Step(StepKind.VERIFY_RELEASE, SLEEP_RELEASE_SECS))
    return Plan(PlanKind.PARK, tuple(steps), Outcome.PARKED, _down(model, grace=True), eviction)


def _retains_suspended(eviction: Eviction) -> bool:
    return eviction.weights is Weights.RETAIN and eviction.process in SUSPENDING


def deepen_plan(model: ModelConfig, present: Eviction, deeper: Eviction) -> Plan:
    """From parked by ``present`` to parked by ``deeper``, with the same weights: what the engine
    has not done yet. Frozen, it is thawed first: it has to take part."""
    plan = park_plan(model, deeper)
    done = {StepKind.SLEEP}
    if present.process is Process.CUDA_SUSPEND:  # it answers nothing
        done |= {StepKind.RESET_PREFIX_CACHE, StepKind.DISCARD_CACHE}
        done |= {StepKind.COMM_SUSPEND, StepKind.CUDA_SUSPEND}
    steps = tuple(step for step in plan.steps if step.kind not in done)
    if present.process in (Process.FREEZE, Process.CUDA_SUSPEND):
        steps = (Step(StepKind.THAW, FREEZE_SECS), *steps)
    return replace(plan, steps=steps)


def without_image_plan(model: ModelConfig, eviction: Eviction, *, suspended: bool) -> Plan | None:
    """After a dump that failed and left the engine unharmed: the engine stays in host memory, as
    the steps before the dump left it. ``suspended``: its CUDA state is there already. None when it
    cannot stay: the communicators of several workers were taken down for the dump."""
    if not suspended and model.ranks > 1:
        return None
    process = Process.CUDA_SUSPEND if suspended else Process.KEEP_RUNNING
    kept = Eviction(eviction.weights, process)
    steps = (Step(StepKind.FREEZE, FREEZE_SECS),) if suspended else ()
    if not keeps_gpu(kept):
        steps = (*steps, Step(StepKind.VERIFY_RELEASE, SLEEP_RELEASE_SECS))
    return Plan(PlanKind.PARK, steps, Outcome.PARKED, _down(model, grace=False), kept)


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
    elif asleep and kinds[:1] == [StepKind.SLEEP]:
        done = 1
    return replace(plan, steps=plan.steps[done:])


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
    if _retains_suspended(eviction):
        # whatever the configuration says now: done where the engine's was discarded
        steps.append(Step(StepKind.RETURN_CACHE, model.wake_timeout_secs))
    steps += (_stage(model, stage) for stage in model.engine_type.wake_stages[eviction.weights])
    steps.append(Step(StepKind.WAIT_HEALTHY, PROBE_SECS))
    if model.canary:
        steps.append(Step(StepKind.CANARY_CHECK, CANARY_SECS))
    return Plan(PlanKind.WAKE, tuple(steps), Outcome.UP, _down(model, grace=False), eviction)


def _stage(model: ModelConfig, stage: WakeStage) -> Step:
    secs = PROBE_SECS if stage.optional else model.wake_timeout_secs
    return Step(StepKind(stage.action), secs, tags=stage.tags, optional=stage.optional)


def resume_wake_plan(model: ModelConfig, eviction: Eviction) -> Plan:
    """The rest of a wake that a former supervisor began, of an engine that is there.

    What it had restored and not verified it had not noted down either (whose CUDA state is in host
    memory, what it answered): once more from the image, whose pids it must not hold meanwhile.
    """
    plan = wake_plan(model, eviction)
    if eviction.process is not Process.CHECKPOINT:
        return plan
    return replace(plan, steps=(*_down(model, grace=False), *plan.steps))
