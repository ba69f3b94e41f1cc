"""Where a model is placed: prices of the GPUs as the present state makes them.

Built once for a decision, so that hundreds of waiting models cost it little.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llmux.config.schema import Process
from llmux.core.demand.usage import UNUSED
from llmux.core.operations import stop
from llmux.core.placement.prices import (
    IN_USE_SECS,
    Absent,
    worth_of,
)
from llmux.core.policies.base import Resident, Waiting
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Serving,
    Stopped,
    coming,
    stays_resident,
)
from llmux.core.room import GPUs, Room
from llmux.core.transaction import Transaction


class Choice:
    """Answers what ``Room.place`` asks about a GPU."""

    def __init__(self, tx: Transaction, room: Room) -> None:
        self._tx = tx
        self.room = room
        self._absent: dict[int, Absent] = {}

    def making_room(self, gpu: int) -> float:
        """What it costs to send the models on the GPU away: a kept one cannot leave; then those
        that move or are in use, by their requests; idle ones cost the least."""
        tx, total = self._tx, 0.0
        for name in self.room.on(gpu):
            record = tx.models[name]
            if not stays_resident(record):
                continue
            if tx.is_kept(name):
                return math.inf
            demand = tx.demand(name)
            comes = not isinstance(record.phase, Serving)
            total += demand.in_flight + demand.waiting + (2.0 if comes else 1.0)
        return total

    def displaced(self, record: ModelRecord, gpu: int, free: float) -> float:
        """What the model would take from others that are in use and away, by their worth."""
        if (absent := self._absent.get(gpu)) is None:
            absent = self._absent[gpu] = Absent(self._could_live_on(gpu))
        counted = self._is_in_use(record) and _may_live_on(self._tx.models[record.config.name], gpu)
        own = self._worth(record) if counted else 0.0
        return absent.displaced(free, record.config.gpu_memory, own)

    def last_used(self, gpu: int) -> float:
        """When a model on the GPU was in use last. What is used together lives side by side, so
        that a model that needs a whole GPU does not send one of each pair away; and what was asked
        for with the waiting model is not sent away for it."""
        there = (self._tx.models[name] for name in self.room.on(gpu))
        return max((one.last_active for one in there if stays_resident(one)), default=0.0)

    def move(self, target: Waiting, victims: list[Resident]) -> bool:
        """Stop a parked engine whose GPUs have no room, for a cold start on others that have it
        now, once the returns for which others made room have taken as long as that start: it costs
        no more than twice what hindsight would have done. At once where the others cannot leave.
        True: it is being stopped."""
        tx, room, name = self._tx, self.room, target.model
        record = tx.models[name]
        phase = record.phase
        if not isinstance(phase, Parked) or not isinstance(record.config.gpus, int):
            return False
        if record.image is not None or phase.eviction.process is Process.CHECKPOINT:
            return False  # an image is restored where it was made
        if not room.may_leave(name):
            return False
        gpus = self._elsewhere(record)
        if gpus is None or not self._pays(target, record, gpus, victims):
            return False
        stop(tx, name, "moves to GPUs that have room", grace=True)
        room.refresh(name)
        room.reserve(name, gpus, record.config.gpu_memory)
        return True

    def _elsewhere(self, record: ModelRecord) -> GPUs | None:
        """GPUs on which the model could start at once."""
        name, share = record.config.name, record.config.gpu_memory
        gpus = self.room.place(replace(record, phase=Stopped(self._tx.now)), self)
        if gpus is None or set(gpus) & set(record.gpus):
            return None
        if not self.room.may_come(gpus) or not self.room.fits_now(name, gpus, share):
            return None
        return gpus

    def _pays(
        self, target: Waiting, record: ModelRecord, gpus: GPUs, victims: list[Resident]
    ) -> bool:
        tx = self._tx
        assert isinstance(record.phase, Parked)
        if not victims:
            there = self.room.neighbours(target.model, record.gpus)
            return any(tx.is_kept(n) and isinstance(tx.models[n].phase, Serving) for n in there)
        if any(self.displaced(record, gpu, self.room.free(gpu)) for gpu in gpus):
            return False  # it would be sent away from there as well
        return record.switched_secs >= tx.cost(target.model, coming(None))

    def _could_live_on(self, gpu: int) -> list[tuple[float, float]]:
        return [
            (record.config.gpu_memory, self._worth(record))
            for record in self._tx.models.values()
            if isinstance(record.phase, (Stopped, Parked, Failed))
            and self._is_in_use(record)
            and _may_live_on(record, gpu)
        ]

    def _is_in_use(self, record: ModelRecord) -> bool:
        return self._tx.now - record.last_active < IN_USE_SECS

    def _worth(self, record: ModelRecord) -> float:
        usage = self._tx.usage.get(record.config.name, UNUSED)
        return worth_of(usage.rate_at(self._tx.now), self._back(record))

    def _back(self, record: ModelRecord) -> float:
        """Seconds that the model takes to come back from where it is."""
        name = record.config.name
        return self._tx.cost(name, coming(self._tx.way_back(name)))


def _may_live_on(record: ModelRecord, gpu: int) -> bool:
    wanted = record.gpus if isinstance(record.phase, Parked) else record.config.gpus
    return isinstance(wanted, int) or gpu in wanted
