"""Images that make room for others, but for those that are needed now. For one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Final

from llmux.drivers.images.budget import enforce_budget, look_for_room
from llmux.drivers.images.store import ImageStore

log = logging.getLogger("llmux")

EXPECTED_SECS: Final = 300.0  # an image that was read ahead and never restored is no one's by then


class ImageRoom:
    """``in_use``: models whose image is being restored."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self.in_use: set[str] = set()
        self._expected: dict[str, float] = {}
        self._removed: list[str] = []

    def expect(self, model: str) -> None:
        """The model's image is read, since it will be restored next."""
        self._expected[model] = monotonic()

    def restored(self, model: str) -> None:
        self.in_use.discard(model)
        self._expected.pop(model, None)

    def _needed(self) -> set[str]:
        since = monotonic() - EXPECTED_SECS
        return self.in_use | {model for model, at in self._expected.items() if at > since}

    async def check(self, model: str, needed: int) -> None:
        """Raises CheckpointFailed where an image of that size has no place; removes nothing."""
        await asyncio.to_thread(
            look_for_room, self._store, model, needed, protected=self._needed() - {model}
        )

    async def make(self, model: str, needed: int, cold_seconds: float) -> None:
        """For an image that saves ``cold_seconds``. Raises CheckpointFailed where there is none."""
        removed = await asyncio.to_thread(
            look_for_room,
            self._store,
            model,
            needed,
            protected=self._needed() - {model},
            cold_seconds=cold_seconds,
        )
        for name in removed:
            await asyncio.to_thread(self._store.discard, name)
            self._tell(name, f'it made room for the image of model "{model}"')

    async def enforce(self, spared: Collection[str]) -> None:
        """checkpoint.max_bytes holds; images of the ``spared`` models and needed ones stay."""
        protected = self._needed() | set(spared)
        for name in await asyncio.to_thread(enforce_budget, self._store, protected):
            self._tell(name, "checkpoint.max_bytes is reached")

    def _tell(self, model: str, reason: str) -> None:
        log.info('removed the image of model "%s": %s', model, reason, extra={"model": model})
        self._removed.append(model)

    def take_removed(self) -> Sequence[str]:
        removed, self._removed = self._removed, []
        return removed
