"""Room for images: checkpoint.max_bytes and the disk, and which images go for another one.

An image is worth the seconds that it saves, the less the longer it was not used; per byte when one
of several goes. Another model's image goes for a new one only where it is worth less.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from llmux.drivers.images.store import ImageStore
from llmux.drivers.memory import disk_space
from llmux.errors import CheckpointFailed, TreeState

FREE_RESERVE: Final = 1.05  # metadata, and what else grows on that disk meanwhile


@dataclass(frozen=True, slots=True)
class Kept:
    """An image on disk. ``worth`` in seconds; 0 for one that is replaced anyway."""

    model: str
    size: int
    worth: float


def to_remove(
    kept: Sequence[Kept], missing: int, protected: Collection[str], most: float
) -> list[str] | None:
    """Models whose images go for ``missing`` bytes: the least valuable per byte, those that turn
    out not to be needed stay. None where what may go is not enough, or is worth more than
    ``most``."""
    chosen: list[Kept] = []
    for one in sorted(kept, key=lambda one: one.worth / max(one.size, 1)):
        if one.model not in protected and sum(other.size for other in chosen) < missing:
            chosen.append(one)
    for one in sorted(chosen, key=lambda one: -one.worth):
        if sum(other.size for other in chosen) - one.size >= missing:
            chosen.remove(one)
    if sum(one.size for one in chosen) < missing or sum(one.worth for one in chosen) > most:
        return None
    return [one.model for one in chosen]


def _kept(store: ImageStore, replaced: str = "") -> list[Kept]:
    now = store.clock()
    rows = []
    for image, manifest in store.with_manifests():
        hours = max(now - image.last_used, 0.0) / 3600
        worth = 0.0 if image.model == replaced else manifest.cold_seconds / (1 + hours)
        rows.append(Kept(image.model, image.disk_bytes, worth))
    return rows


def _refused(model: str, needed: int, limit: str, hint: str) -> CheckpointFailed:
    return CheckpointFailed(
        "checkpoint",
        f'model "{model}"',
        f"its image may take {needed} bytes{limit}",
        hint=f"{hint}, or park with discard: that makes it smaller",
        tree=TreeState.RUNNING,
    )


def _beyond_budget(store: ImageStore, model: str, needed: int) -> CheckpointFailed:
    text = f", more than all images may ({store.max_bytes})"
    return _refused(model, needed, text, "raise checkpoint.max_bytes")


def _beyond_disk(store: ImageStore, model: str, needed: int, free: int) -> CheckpointFailed:
    text = f" and {store.root} has {free} free"
    return _refused(model, needed, text, "free some space there")


def check_disk(store: ImageStore, model: str, needed: int) -> None:
    """Raises CheckpointFailed when an image of ``needed`` bytes has no place without the removal of
    others from the disk."""
    if store.max_bytes is not None and needed > store.max_bytes:
        raise _beyond_budget(store, model, needed)
    store.make_directory(store.root, model)
    _, free = disk_space(store.root)
    if free < needed * FREE_RESERVE:
        raise _beyond_disk(store, model, needed, free)


def look_for_room(
    store: ImageStore,
    model: str,
    needed: int,
    *,
    protected: Collection[str] = (),
    cold_seconds: float = math.inf,
) -> list[str]:
    """Models whose images must go before one of ``needed`` bytes that saves ``cold_seconds`` is
    made, its own former one perhaps among them. Raises CheckpointFailed when it has no place."""
    store.make_directory(store.root, model)
    kept = _kept(store, replaced=model)
    over = 0
    if store.max_bytes is not None:
        over = needed + sum(one.size for one in kept) - store.max_bytes
    _, free = disk_space(store.root)
    short = math.ceil(needed * FREE_RESERVE) - free
    removed = to_remove(kept, max(over, short), protected, cold_seconds)
    if removed is not None:
        return removed
    if store.max_bytes is not None and over >= short:
        if needed > store.max_bytes:
            raise _beyond_budget(store, model, needed)
        text = f"; images that are worth more or needed now leave less of {store.max_bytes}"
        raise _refused(model, needed, text, "raise checkpoint.max_bytes")
    raise _beyond_disk(store, model, needed, free)


def enforce_budget(store: ImageStore, protected: Collection[str] = ()) -> list[str]:
    """Remove the least valuable images until all fit into ``max_bytes``, never those of the models
    in ``protected`` (just made, or in use). Returns the models that lost theirs."""
    if store.max_bytes is None:
        return []
    kept = _kept(store)
    movable = sum(one.size for one in kept if one.model not in protected)
    over = min(sum(one.size for one in kept) - store.max_bytes, movable)
    removed = to_remove(kept, over, protected, math.inf) or []
    for model in removed:
        store.discard(model)
    return removed
