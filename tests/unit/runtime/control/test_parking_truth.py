"""One truth about parking: the file checker, operators' orders and plans agree on every model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from runtime_harness import in_loop
from test_verbs import desk

from llmux.config.load import load_config
from llmux.config.schema import Config, Eviction, ModelConfig, Process, Weights
from llmux.core.plans import StepKind, park_plan
from llmux.errors import ConfigError, Refused

PAIRS = [Eviction(weights, process) for weights in Weights for process in Process]
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "single": (),
    "tensor": ("--tensor-parallel-size", "2"),
    "pipeline": ("-pp=2",),
    "both": ("-tp", "2", "--pipeline_parallel_size=2"),
}
GPUS: dict[str, tuple[int, ...] | int] = {"one": 1, "listed": (0, 1, 2, 3), "count": 4}
FACTS = [
    (f"{arguments}-{gpus}-{allow}", ARGUMENTS[arguments], GPUS[gpus], allow)
    for arguments, gpus, allow in itertools.product(ARGUMENTS, GPUS, (False, True))
    if not (gpus == "one" and arguments != "single")  # refused for another reason
]
PARALLEL = {name for name, args, _, allow in FACTS if args and not allow}


def model_of(name: str, args: tuple[str, ...], gpus: Any, allow: bool) -> ModelConfig:
    return ModelConfig(
        name, "org/m", extra_args=args, gpus=gpus, allow_tensor_parallel_parking=allow
    )


def refused_by_check(eviction: Eviction, folder: Path) -> set[str]:
    models = {
        name: {
            "model_path": "org/m",
            "eviction": str(eviction),
            "extra_args": args,
            "gpus": gpus,
            "allow_tensor_parallel_parking": allow,
        }
        for name, args, gpus, allow in FACTS
    }
    file = folder / "config.json"
    file.write_text(json.dumps({"models": models}))
    try:
        load_config(file)
    except ConfigError as error:
        assert all("cannot use" in problem.message for problem in error.problems)
        return {problem.path.split(".")[1] for problem in error.problems}
    return set()


def stopped_by_plan(eviction: Eviction) -> set[str]:
    plans = {fact[0]: park_plan(model_of(*fact), eviction) for fact in FACTS}
    stopping = {
        name for name, plan in plans.items() if any(s.kind is StepKind.KILL for s in plan.steps)
    }
    return set() if eviction.process is Process.STOP else stopping


@in_loop
async def test_check_orders_and_plans_agree_on_every_pair_and_every_model(tmp_path: Path) -> None:
    async with desk(Config(models={fact[0]: model_of(*fact) for fact in FACTS}, gpu_count=4)) as d:
        for eviction in PAIRS:
            refused = set()
            for name, *_ in FACTS:
                try:
                    await d.ask("eviction_set", model=name, eviction=str(eviction))
                except Refused as error:
                    assert "NCCL" in error.message
                    refused.add(name)
            suspends = eviction.process in (Process.CUDA_SUSPEND, Process.CHECKPOINT)
            assert refused == (PARALLEL if suspends else set()), eviction
            assert refused_by_check(eviction, tmp_path) == refused, eviction
            assert stopped_by_plan(eviction) == refused, eviction
