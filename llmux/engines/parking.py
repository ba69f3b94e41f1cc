"""The two axes of parking, and whether a model can be parked so. Pure.

One predicate, ``parking_obstacle``, serves the configuration's checks, operators' orders and plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Weights(StrEnum):
    """What the engine does with its weights before the process axis acts."""

    RETAIN = "retain"
    OFFLOAD = "offload"  # to host memory
    DISCARD = "discard"


class Process(StrEnum):
    """What happens to the engine's processes."""

    KEEP_RUNNING = "keep_running"
    FREEZE = "freeze"
    CUDA_SUSPEND = "cuda_suspend"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


# These take the CUDA state out of the processes.
SUSPENDING: Final = frozenset({Process.CUDA_SUSPEND, Process.CHECKPOINT})


@dataclass(frozen=True, slots=True)
class Eviction:
    """The two axes of parking; written ``weights+process`` on the command line and in logs."""

    weights: Weights = Weights.RETAIN
    process: Process = Process.STOP

    def __str__(self) -> str:
        return f"{self.weights}+{self.process}"

    @classmethod
    def parse(cls, text: str) -> Eviction:
        """The inverse of ``str``. ValueError names what is wrong."""
        weights, _, process = text.partition("+")
        if weights not in list(Weights) or process not in list(Process):
            raise ValueError(f'expected {"|".join(Weights)}+{"|".join(Process)}, got "{text}"')
        return cls(Weights(weights), Process(process))


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a model cannot be parked so: ``message`` is an error, ``hint`` the next step."""

    message: str
    hint: str


def parking_obstacle(
    eviction: Eviction, *, engine: str, ranks: int, allow_parallel: bool
) -> Obstacle | None:
    """``ranks``: the number of GPUs that the engine's own arguments spread it over.

    How many GPUs the model was given does not matter: an engine that uses one of them has no
    connections between GPUs. Those, NCCL's, survive neither a CUDA checkpoint nor CRIU.
    """
    if eviction.process not in SUSPENDING or ranks <= 1 or allow_parallel:
        return None
    return Obstacle(
        f"cannot use {eviction.process} with a model on {ranks} GPUs: NCCL's connections do not "
        f"survive it in a stock {engine}",
        f"use keep_running, freeze or stop, or, for a {engine} that can, set "
        "allow_tensor_parallel_parking: true",
    )
