"""What the core asks of the world. Frozen values: a test of a decision is an equality."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llmux.config.schema import ModelConfig
from llmux.core.plans import Plan
from llmux.errors import Reason


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
    """Look for signs of life of the serving engine; answered by ProbeFinished. ``seconds``: for how
    long at most. ``stalled``: it has requests and no byte came for a while; else a connection
    broke."""

    model: str
    epoch: str
    config: ModelConfig
    seconds: float
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """Read the model's image into the page cache: it will be restored when there is room."""

    model: str
    config: ModelConfig
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """Read the model's weights into the page cache: its engine will load them when the room that is
    being made is there. EndReading follows."""

    model: str
    config: ModelConfig
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EndReading:
    """The model's weights are read no further: it serves, or is not wanted any more."""

    model: str


@dataclass(frozen=True, slots=True)
class RestoreAhead:
    """Do the part of the model's restore that needs no GPU while room is being made. Its wake
    takes over the result; otherwise DropAhead follows.

    ``into_ram``: models that are moving from the GPU into host memory, which must stay free for
    them. ``deadline``: seconds after which every request that waits now has timed out.
    """

    model: str
    config: ModelConfig
    gpus: tuple[int, ...]
    into_ram: tuple[str, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class DropAhead:
    """End what was restored ahead; its image stays."""

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
    """End what is in flight. ``error``: why, when it is not for another model's sake."""

    worker: str
    model: str
    epoch: str
    error: str | None = None


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
    """A model was made resident. Times in seconds on the reducer's clock. What it waited, before
    this was decided, ``behind`` models that make no room for others is no part of its duration."""

    model: str
    victims: tuple[str, ...]
    cold: bool
    decided_at: float
    drained_at: float  # when the last victim had no request left
    room_at: float  # when the room was there and the engine's own start or wake began
    serving_at: float
    behind: tuple[str, ...] = ()
    waited_secs: float = 0.0


class Verdict(StrEnum):
    """What the core made of an operator's order."""

    ACCEPTED = "accepted"  # under way, or waiting for room
    ALREADY = "already"  # the model was in the state asked for
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class OrderAnswered:
    """The answer to the LoadAsked or ParkAsked with this ``order``. ``reason`` and ``message`` say
    why it was refused."""

    order: int
    verdict: Verdict
    reason: Reason | None = None
    message: str = ""


Effect = (
    RunPlan
    | Probe
    | ReadAhead
    | ReadWeights
    | EndReading
    | RestoreAhead
    | DropAhead
    | SendGrant
    | SendRevoke
    | SendCut
    | SendRefuse
    | SwitchFinished
    | OrderAnswered
)
