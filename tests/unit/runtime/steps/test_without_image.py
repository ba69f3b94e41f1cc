"""After a dump that left its engine unharmed: when it stays parked without an image, and how."""

from __future__ import annotations

from typing import Any

import pytest
from drivers_called import CHECKPOINT, CONFIG, HANDLE
from runtime_harness import OFFLOAD, STOP

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import RunPlan
from llmux.core.plans import Plan, PlanKind, park_plan, start_plan, wake_plan
from llmux.errors import CheckpointFailed, DriverError, TreeState
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.instance import Instance
from llmux.runtime.engines.other_plans import without_image

SUSPEND = Eviction(Weights.OFFLOAD, Process.CUDA_SUSPEND)
PARK = park_plan(CONFIG, CHECKPOINT)


def failed(tree: TreeState = TreeState.RUNNING) -> CheckpointFailed:
    return CheckpointFailed("dump", "a", "the disk is full", tree=tree)


def kept(
    plan: Plan = PARK, failure: Exception | None = None, engine: bool = True, **facts: Any
) -> RunPlan | None:
    instance = Instance(CONFIG, HANDLE if engine else None, EngineFacts(**facts))
    effect = RunPlan("a", 3, plan, CONFIG, (0,))
    return without_image(effect, instance, failure or failed())


@pytest.mark.parametrize(
    ("facts", "eviction"),
    [
        ({"cuda_pids": (7,)}, SUSPEND),
        ({"cuda_pids": (7,), "cache_discarded": True}, SUSPEND),
        ({}, OFFLOAD),
    ],
    ids=str,
)
def test_it_stays_parked_as_far_as_it_came(facts: dict[str, Any], eviction: Eviction) -> None:
    effect = kept(**facts)
    assert effect is not None
    assert (effect.plan.kind, effect.plan.eviction) == (PlanKind.PARK, eviction)
    assert (effect.model, effect.op, effect.gpus) == ("a", 3, (0,))


@pytest.mark.parametrize(
    "case",
    [
        {"failure": failed(TreeState.BROKEN)},
        {"failure": failed(TreeState.GONE)},
        {"failure": DriverError("dump", "a", "it is odd")},
        {"engine": False},
        {"cache_discarded": True},
        {"plan": park_plan(CONFIG, SUSPEND)},
        {"plan": park_plan(CONFIG, STOP)},
        {"plan": start_plan(CONFIG, 60.0)},
        {"plan": wake_plan(CONFIG, CHECKPOINT)},
    ],
    ids=str,
)
def test_else_it_does_not(case: dict[str, Any]) -> None:
    assert kept(**({"cuda_pids": (7,)} if "plan" in case else {}) | case) is None
