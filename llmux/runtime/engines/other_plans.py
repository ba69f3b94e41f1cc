"""Another plan than was ordered: before a park that this host has no memory for, and after a dump
that left the engine unharmed.

vLLM's sleep at level 1 copies the weights into pinned host memory: it is not swapped, and the
kernel's out-of-memory killer ends engines for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from llmux.config.schema import Eviction, ModelConfig, Weights
from llmux.core.effects import RunPlan
from llmux.core.plans import Plan, PlanKind, StepKind, park_plan, without_image_plan
from llmux.errors import CheckpointFailed, TreeState
from llmux.runtime.engines.instance import Instance

_WEIGHTS: Final = re.compile(r"file\..+\.safetensors")
_SIZE: Final = re.compile(r"(\d+) bytes\b")
SPARE_BYTES: Final = 1 << 30  # must stay free for the rest of the machine


def weights_bytes(identity: Mapping[str, str]) -> int:
    """Of the model's files, by its identity; 0 when they are not known."""
    sizes = (_SIZE.match(value) for name, value in identity.items() if _WEIGHTS.fullmatch(name))
    return sum(int(found[1]) for found in sizes if found is not None)


def offload_bytes(identity: Mapping[str, str]) -> int:
    """Host memory that must be free before the weights are offloaded; 0 when that is not known."""
    weights = weights_bytes(identity)
    return weights + SPARE_BYTES if weights else 0


def fitting(
    plan: Plan, config: ModelConfig, identity: Mapping[str, str], available: int
) -> tuple[Plan, str]:
    """``plan``, or where the weights do not fit into host memory the same with them discarded, and
    why."""
    eviction = plan.eviction
    sleeps = any(step.kind is StepKind.SLEEP for step in plan.steps)
    need = offload_bytes(identity)
    if eviction is None or eviction.weights is not Weights.OFFLOAD or not sleeps:
        return plan, ""
    if available >= need:
        return plan, ""
    why = (
        f"weights are discarded, not offloaded: that takes {need / 2**30:.1f} GiB of host memory,"
        f" and MemAvailable is {available / 2**30:.1f} GiB"
    )
    return park_plan(config, Eviction(Weights.DISCARD, eviction.process)), why


def without_image(effect: RunPlan, instance: Instance, failure: Exception) -> RunPlan | None:
    """The way to stay parked after a dump that left the engine unharmed, if there is one."""
    eviction = effect.plan.eviction
    unharmed = isinstance(failure, CheckpointFailed) and failure.tree is TreeState.RUNNING
    parks = effect.plan.kind is PlanKind.PARK and effect.plan.dumps
    if not (unharmed and parks) or eviction is None or instance.handle is None:
        return None
    suspended = bool(instance.facts.cuda_pids)
    if instance.facts.cache_discarded and not suspended:
        return None  # the way back from the parking that is left returns no cache
    plan = without_image_plan(effect.config, eviction, suspended=suspended)
    return None if plan is None else replace(effect, plan=plan)
