"""Room on the GPUs: what each model holds, what fits where, which models would have to leave.

Built once for a decision and kept up to date while the decision changes models, so that looking at
the next waiting model costs the same however many models there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from llmux.config.schema import Eviction, Process
from llmux.core.records import (
    ROUNDING,
    ModelRecord,
    Parked,
    Serving,
    Stopped,
    frees_memory,
    is_resident,
    moves_memory,
    parked_share,
    share_after,
    share_now,
    stays_resident,
)

Load = dict[int, float]  # GPU index → share
GPUs = tuple[int, ...]


class Prices(Protocol):
    """What placing a model on a GPU costs; see ``placement``."""

    def making_room(self, gpu: int) -> float: ...

    def displaced(self, record: ModelRecord, gpu: int, free: float) -> float: ...

    def last_used(self, gpu: int) -> float: ...


@dataclass(frozen=True, slots=True)
class _Held:
    gpus: GPUs
    now: float
    after: float


NOTHING = _Held((), 0.0, 0.0)


class Room:
    """Shares of each GPU: held now, held once all present operations have ended well, and
    reserved for waiting models in front of the one that is considered. Which models have a memory
    transition under way on it."""

    def __init__(
        self,
        models: Mapping[str, ModelRecord],
        gpu_count: int,
        exclusive: Iterable[Collection[str]] = (),
    ) -> None:
        self._models = models
        self._apart: dict[str, set[str]] = {}  # name → models that it is never resident with
        for group in exclusive:
            for name in group:
                others = (other for other in group if other != name and other in models)
                self._apart.setdefault(name, set()).update(others)
        self._reserved_for: set[str] = set()
        self.gpu_count = gpu_count
        self._now: Load = {}
        self._after: Load = {}
        self._reserved: Load = {}
        self._kept: Load = {}  # of models that make no room
        self._held: dict[str, _Held] = {}
        self._on: dict[int, set[str]] = {}
        self._moving: dict[int, set[str]] = {}
        self._next_to_move: set[int] = set()
        for name, record in models.items():
            if not isinstance(record.phase, Stopped):  # those hold nothing, and may be hundreds
                self.refresh(name)

    def refresh(self, name: str) -> None:
        """The model changed."""
        record = self._models[name]
        share = share_now(record)
        if isinstance(record.phase, Parked):  # at rest, as hundreds may be
            new = _Held(record.gpus, share, share)
        else:
            if moves_memory(record):
                for gpu in record.gpus:
                    self._moving.setdefault(gpu, set()).add(name)
            new = _Held(record.gpus, share, share_after(record))
        old = self._own(name)
        if new == old:
            return
        for gpu in old.gpus:
            self._now[gpu] -= old.now
            self._after[gpu] -= old.after
            self._on[gpu].discard(name)
        for gpu in new.gpus:
            self._now[gpu] = self._now.get(gpu, 0.0) + new.now
            self._after[gpu] = self._after.get(gpu, 0.0) + new.after
            on = self._on.setdefault(gpu, set())
            if new.now > ROUNDING:  # after, it holds no more
                on.add(name)
        self._held[name] = new

    def _own(self, name: str) -> _Held:
        return self._held.get(name, NOTHING)

    def reserve(self, name: str, gpus: GPUs, share: float) -> None:
        self._reserved_for.add(name)
        for gpu in gpus:
            self._reserved[gpu] = self._reserved.get(gpu, 0.0) + share

    # ---- may it move --------------------------------------------------------------------------

    def may_leave(self, name: str) -> bool:
        """No other model has a memory transition under way on the model's GPUs."""
        gpus = self._models[name].gpus
        return all(self._moving.get(gpu, set()) <= {name} for gpu in gpus)

    def may_come(self, gpus: GPUs) -> bool:
        """No memory transition is under way on these GPUs, or about to be."""
        return not any(self._moving.get(gpu) or gpu in self._next_to_move for gpu in gpus)

    def comes_next(self, gpus: GPUs) -> None:
        """No model behind may begin a transition here first."""
        self._next_to_move.update(gpus)

    # ---- does it fit --------------------------------------------------------------------------

    def fits_now(self, name: str, gpus: GPUs, share: float) -> bool:
        return not self._rivals(name, is_resident) and self._fits(
            self._now, self._own(name).now, name, gpus, share
        )

    def fits_after(self, name: str, gpus: GPUs, share: float) -> bool:
        return not self._rivals(name, stays_resident) and self._fits(
            self._after, self._own(name).after, name, gpus, share
        )

    def could_fit(self, name: str, gpus: GPUs, share: float) -> bool:
        """Would it fit if every model left that is not reserved for?"""
        if self._apart.get(name, set()) & self._reserved_for:
            return False
        return all(self._reserved.get(gpu, 0.0) + share <= 1.0 + ROUNDING for gpu in gpus)

    def keep(self, names: Iterable[str]) -> None:
        """These models make no room for others."""
        for name in names:
            held = self._own(name)
            for gpu in held.gpus:
                self._kept[gpu] = self._kept.get(gpu, 0.0) + held.now

    def is_reserved(self, least: float) -> bool:
        """So much is reserved or kept on every GPU that a share of ``least`` could fit nowhere."""
        limit = 1.0 + ROUNDING - least
        return all(
            self._reserved.get(gpu, 0.0) + self._kept.get(gpu, 0.0) > limit
            for gpu in range(self.gpu_count)
        )

    def _rivals(self, name: str, is_there: Callable[[ModelRecord], bool]) -> set[str]:
        """Models of the same exclusive group that are there, or that room is reserved for."""
        apart = self._apart.get(name, set())
        return {
            other for other in apart if other in self._reserved_for or is_there(self._models[other])
        }

    def _fits(self, load: Load, own: float, name: str, gpus: GPUs, share: float) -> bool:
        mine = self._own(name).gpus
        for gpu in gpus:
            others = load.get(gpu, 0.0) - (own if gpu in mine else 0.0)
            if others + self._reserved.get(gpu, 0.0) + share > 1.0 + ROUNDING:
                return False
        return True

    # ---- where --------------------------------------------------------------------------------

    def on(self, gpu: int) -> Collection[str]:
        """Models that hold anything on the GPU."""
        return self._on.get(gpu, ())

    def free(self, gpu: int) -> float:
        """The share of the GPU that nothing holds, nor is reserved."""
        return 1.0 - self._after.get(gpu, 0.0) - self._reserved.get(gpu, 0.0)

    def place(self, record: ModelRecord, prices: Prices | None = None) -> GPUs | None:
        """The GPUs that the model is to live on; None when this host does not have them. Of those
        with room, where no other model in use loses its place, then the emptiest, then beside what
        was in use last; else those that cost the least to empty, then those used longest ago."""
        if isinstance(record.phase, Parked):
            return record.gpus  # a parked engine cannot move
        wanted = record.config.gpus
        if isinstance(wanted, tuple):
            return wanted if all(gpu < self.gpu_count for gpu in wanted) else None
        if wanted >= self.gpu_count:
            return tuple(range(self.gpu_count)) if wanted == self.gpu_count else None
        own = self._own(record.config.name)
        share = record.config.gpu_memory

        def cost(gpu: int) -> tuple[float, ...]:
            others = self._after.get(gpu, 0.0) - (own.after if gpu in own.gpus else 0.0)
            load = others + self._reserved.get(gpu, 0.0)
            if prices is None:
                return load, gpu
            if load + share <= 1.0 + ROUNDING:
                lost = prices.displaced(record, gpu, 1.0 - load)
                return 0.0, lost, round(load, 6), -prices.last_used(gpu), gpu
            return 1.0, prices.making_room(gpu), prices.last_used(gpu), load, gpu

        return tuple(sorted(sorted(range(self.gpu_count), key=cost)[:wanted]))

    def cannot_fit(self, record: ModelRecord) -> str:
        """Why there is no place for it on this host."""
        wanted = record.config.gpus
        text = f"GPUs {list(wanted)}" if isinstance(wanted, tuple) else f"{wanted} GPUs"
        return (
            f'model "{record.config.name}" wants {text}, but this host has {self.gpu_count};'
            " change `gpus` in its configuration"
        )

    # ---- victims ------------------------------------------------------------------------------

    def neighbours(self, name: str, gpus: GPUs) -> set[str]:
        """Models that hold anything on these GPUs, or that the model is never resident with."""
        rivals = self._rivals(name, stays_resident)
        return rivals.union(*(self._on.get(gpu, ()) for gpu in gpus))

    def victims(
        self, name: str, gpus: GPUs, share: float, serving: Iterable[str], residues: Iterable[str]
    ) -> dict[str, Eviction]:
        """The fewest, in the order given, whose leaving makes room, and how each leaves. Parked
        residues may be in the way too: then only a stop helps. Empty: nothing helps."""
        order = [*serving, *residues]
        for how in (own_way, stopped):
            if chosen := self._victims_leaving(name, gpus, share, order, how):
                return chosen
        return {}

    def _victims_leaving(
        self,
        name: str,
        gpus: GPUs,
        share: float,
        order: Iterable[str],
        how: Callable[[ModelRecord], Eviction],
    ) -> dict[str, Eviction]:
        load = dict(self._after)
        own = self._own(name).after
        rivals = self._rivals(name, stays_resident)
        order = sorted(order, key=lambda one: one not in rivals)

        def fits(load: Load) -> bool:
            return self._fits(load, own, name, gpus, share)

        gains: dict[str, float] = {}
        for victim in order:
            if fits(load) and victim not in rivals:
                break
            record = self._models[victim]
            serving = isinstance(record.phase, Serving)
            kept = parked_share(record.config, how(record), record.residue) if serving else 0.0
            gains[victim] = share_after(record) - kept
            add(load, record.gpus, -gains[victim])
        if not fits(load) or not rivals <= gains.keys():
            return {}
        for victim in [one for one in gains if one not in rivals]:  # who is not needed stays
            again = dict(load)
            add(again, self._models[victim].gpus, gains[victim])
            if fits(again):
                load = again
                del gains[victim]
        return {victim: how(self._models[victim]) for victim in gains}


def add(load: Load, gpus: GPUs, share: float) -> None:
    for gpu in gpus:
        load[gpu] += share


def own_way(record: ModelRecord) -> Eviction:
    """The model's own way of parking, or stop when that would leave its memory where it is."""
    return record.eviction if frees_memory(record.config, record.eviction) else stopped(record)


def stopped(record: ModelRecord) -> Eviction:
    return Eviction(record.eviction.weights, Process.STOP)
