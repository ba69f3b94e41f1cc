"""What may be asked of the world. Frozen values: a test of a decision is an equality."""

from __future__ import annotations

from dataclasses import dataclass

from llmux.config.schema import ModelConfig
from llmux.core.plans import Plan


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Run ``plan`` on the model; answered by exactly one OperationFinished with the same ``op``."""

    model: str
    op: int
    plan: Plan
    config: ModelConfig
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the serving engine for one token; answered by ProbeFinished."""

    model: str
    epoch: str
    config: ModelConfig


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """The model will be restored from its image as soon as there is room: read it meanwhile."""

    model: str
    config: ModelConfig
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoreAhead:
    """Room is being made for the model: do meanwhile what of its restore needs no GPU. The wake
    takes over what is there; else DropAhead follows.

    ``into_ram``: models that are leaving the GPU for host memory, which they must find there.
    ``deadline``: seconds after which nobody can be waiting for it any more.
    """

    model: str
    config: ModelConfig
    gpus: tuple[int, ...]
    into_ram: tuple[str, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class DropAhead:
    """What was restored ahead will not be woken: nothing of it is to stay but its image."""

    model: str


@dataclass(frozen=True, slots=True)
class SendGrant:
    worker: str
    model: str
    epoch: str


@dataclass(frozen=True, slots=True)
class SendRevoke:
    worker: str
    model: str
    epoch: str
    dead: bool = False


@dataclass(frozen=True, slots=True)
class SendCut:
    worker: str
    model: str
    epoch: str


@dataclass(frozen=True, slots=True)
class SendRefuse:
    """``reason`` is a Reason's value; ``retry_after`` in seconds."""

    worker: str
    model: str
    reason: str
    message: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class SwitchFinished:
    """A model was made resident. Times in seconds on the reducer's clock."""

    model: str
    victims: tuple[str, ...]
    cold: bool
    decided_at: float
    drained_at: float  # when the last victim had no request left
    room_at: float  # when the room was there and the engine's own start or wake began
    serving_at: float


Effect = (
    RunPlan
    | Probe
    | ReadAhead
    | RestoreAhead
    | DropAhead
    | SendGrant
    | SendRevoke
    | SendCut
    | SendRefuse
    | SwitchFinished
)
