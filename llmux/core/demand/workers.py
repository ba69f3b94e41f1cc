"""What the gateway's workers say is asked for, and the sum of it by model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class WorkerDemand:
    waiting: int = 0
    oldest_since: float | None = None
    in_flight: int = 0
    progress: int = 0
    completed: int = 0
    repeated: int = 0


NO_DEMAND = WorkerDemand()


@dataclass(frozen=True, slots=True)
class Worker:
    """A connected gateway worker. ``holds`` is what it may still have requests on."""

    holds: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    demands: Mapping[str, WorkerDemand] = field(default_factory=lambda: MappingProxyType({}))


def demand_by_model(workers: Mapping[str, Worker]) -> dict[str, WorkerDemand]:
    """The demand of all workers together, for the models that any of them has named."""
    names = dict.fromkeys(name for worker in workers.values() for name in worker.demands)
    return {name: demand_for(name, workers.values()) for name in names}


def demand_for(name: str, workers: Iterable[Worker]) -> WorkerDemand:
    """The demand of all workers together for one model."""
    found = [demand for worker in workers if (demand := worker.demands.get(name)) is not None]
    if len(found) == 1:
        return found[0]
    times = [one.oldest_since for one in found if one.waiting and one.oldest_since is not None]
    return WorkerDemand(
        sum(one.waiting for one in found),
        min(times, default=None),
        sum(one.in_flight for one in found),
        sum(one.progress for one in found),
        sum(one.completed for one in found),
        sum(one.repeated for one in found),
    )


def holders(workers: Mapping[str, Worker], name: str, epoch: str) -> list[str]:
    """Workers that hold the epoch of the model."""
    return [one for one, worker in workers.items() if worker.holds.get(name) == epoch]


def busy(workers: Mapping[str, Worker], name: str, epoch: str) -> list[str]:
    """Workers that may still have requests on the engine: those that hold the epoch, and those
    with requests in flight from an earlier one."""
    return [
        one
        for one, worker in workers.items()
        if worker.holds.get(name) == epoch or worker.demands.get(name, NO_DEMAND).in_flight
    ]
