"""What admission keeps its books with: tickets, leases and lines. No rules here."""

from __future__ import annotations

from enum import Enum, auto
from math import inf
from typing import Any

from llmux.gateway.estimate import Departures
from llmux.protocol import Address


class Stage(Enum):
    NEW = auto()
    WAITING = auto()
    IN_FLIGHT = auto()
    ENDED = auto()


class Ticket:
    """One request as admission sees it; ``repeatable`` until the first byte of an answer."""

    __slots__ = (
        "arrived", "deadline", "lease", "limit", "model", "repeatable", "retried", "stage",
        "switch",
    )  # fmt: skip

    def __init__(self, model: str, arrived: float, deadline: float) -> None:
        self.limit = inf  # the client's own; no second wait goes beyond it
        self.model = model
        self.arrived = arrived
        self.deadline = deadline
        self.stage = Stage.NEW
        self.lease: Lease | None = None
        self.repeatable = True
        self.retried = False
        self.switch = b"none"  # what it had to wait for

    @property
    def in_flight(self) -> bool:
        return self.stage is Stage.IN_FLIGHT


class Lease:
    """One epoch of one model: the right to send to ``address``. ``pool`` is the gateway's."""

    __slots__ = (
        "address", "epoch", "in_flight", "line", "pool", "reported_at", "revoked", "suspect_until",
    )  # fmt: skip

    def __init__(self, line: Line, epoch: str, address: Address) -> None:
        self.line = line
        self.epoch = epoch
        self.address = address
        self.in_flight: set[Ticket] = set()
        self.revoked = False
        self.suspect_until: float | None = None
        self.pool: Any = None
        self.reported_at = float("-inf")  # when the gateway last told the supervisor of trouble

    @property
    def model(self) -> str:
        return self.line.model


class Line:
    """What is known of one model: its waiters in order of arrival and the epochs held for it."""

    __slots__ = (
        "completed", "departures", "in_flight", "lease", "leases", "model", "progress", "waiting",
    )  # fmt: skip

    def __init__(self, model: str) -> None:
        self.model = model
        self.waiting: dict[Ticket, None] = {}  # a dict for order and removal in constant time
        self.lease: Lease | None = None  # the one that new requests go to
        self.leases: dict[str, Lease] = {}  # by epoch, draining ones included
        self.in_flight = 0
        self.progress = 0
        self.completed = 0
        self.departures = Departures()

    @property
    def usable(self) -> bool:
        return self.lease is not None and self.lease.suspect_until is None
