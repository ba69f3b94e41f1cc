"""The records admission keeps: tickets, leases and one queue per model. No rules here."""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from math import inf
from typing import Any, Final, Generic, TypeVar

from llmux.gateway.admission.retry_after import Throughput
from llmux.protocol import Address


class Stage(Enum):
    NEW = auto()
    WAITING = auto()
    IN_FLIGHT = auto()
    ENDED = auto()


# For the path of every request: a member's lookup costs six of these.
NEW: Final = Stage.NEW
IN_FLIGHT: Final = Stage.IN_FLIGHT
ENDED: Final = Stage.ENDED


class Ticket:
    """One request as admission sees it; ``repeatable`` until the first byte of its answer.
    ``deaths``: engines that died with it in flight, with nothing else in flight ``alone`` times, on
    the last lease ``broken_on``, after ``lived`` seconds at most. These are set with the first
    death, as ``admitted_at`` is with each admission."""

    __slots__ = (
        "admitted_at", "alone", "arrived", "broken_on", "deadline", "deaths", "lease", "limit",
        "lived", "model", "repeatable", "stage", "switch", "unreached",
    )  # fmt: skip
    admitted_at: float
    alone: int
    broken_on: Lease[Any]
    lived: float

    def __init__(self, model: str, arrived: float, deadline: float) -> None:
        self.limit = inf  # the client's own deadline; a second wait does not exceed it
        self.model = model
        self.arrived = arrived
        self.deadline = deadline
        self.stage = NEW
        self.lease: Lease[Any] | None = None
        self.repeatable = True
        self.unreached: Lease[Any] | None = None  # the last one that it could not be sent on
        self.deaths = 0
        self.switch = b"none"  # the switch it waited for, as X-Llmux-Switch names it

    @property
    def in_flight(self) -> bool:
        return self.stage is Stage.IN_FLIGHT


T = TypeVar("T", bound=Ticket)


class Lease(Generic[T]):
    """One epoch of one model: the right to send to ``address``. The dispatch sets ``pool``. When
    its engine died: how many were in flight (``died_with``)."""

    __slots__ = (
        "address", "died_with", "epoch", "in_flight", "pool", "queue", "reported_at", "revoked",
        "suspect_until",
    )  # fmt: skip

    def __init__(self, queue: ModelQueue[T], epoch: str, address: Address) -> None:
        self.queue = queue
        self.epoch = epoch
        self.address = address
        self.in_flight: set[T] = set()
        self.revoked = False
        self.suspect_until: float | None = None
        self.pool: Any = None
        self.died_with: int | None = None
        self.reported_at = float("-inf")  # when the supervisor was last sent an EngineLost

    @property
    def model(self) -> str:
        return self.queue.model

    @property
    def open(self) -> bool:
        """Whether a new request may be sent on it, if there is room."""
        return self.suspect_until is None and not self.queue.trial

    def tried_again(self) -> None:
        """Its engine may live: what is known of a death is of the past."""
        self.suspect_until = None
        self.died_with = None


class ModelQueue(Generic[T]):
    """One model: its waiting tickets in order of arrival, its leases and its counters."""

    __slots__ = (
        "completed", "groups", "in_flight", "lease", "leases", "model", "others", "progress",
        "repeated", "throughput", "trial", "trial_ends", "tried", "waiting",
    )  # fmt: skip

    def __init__(self, model: str) -> None:
        self.model = model
        self.waiting: dict[T, None] = {}  # a dict for order and removal in constant time
        self.lease: Lease[T] | None = None  # the one that new requests go to
        self.leases: dict[str, Lease[T]] = {}  # by epoch, draining ones included
        self.in_flight = 0
        self.progress = 0
        self.completed = 0
        self.throughput = Throughput()
        # What ``suspects`` keeps. A ticket that waits and has seen a death is in one of the lists.
        self.groups: deque[list[T]] = deque()  # they go one after the other
        self.tried: list[T] = []  # with the last death, on trial: to be made groups of, the next
        self.others: list[T] = []  # with the last death, not on trial: to be the last groups
        self.trial: set[T] = set()  # in flight, and all that wait wait for them
        self.trial_ends = 0.0
        self.repeated = 0  # that saw the last death; 0 once one is completed and nobody is sought

    @property
    def usable(self) -> bool:
        return self.lease is not None and self.lease.suspect_until is None

    def ahead_of(self, ticket: T) -> int:
        """How many wait at this worker and come before it; 0 when it does not wait."""
        if ticket not in self.waiting:
            return 0
        return next(place for place, one in enumerate(self.waiting) if one is ticket)
