"""The runtime reads weights when it is told to, and nothing reads on when it is told not to."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import replace

from runtime_harness import DISCARD, drivers_on, in_loop, model

from llmux.core.effects import ReadWeights
from llmux.ports import EngineUser
from llmux.runtime.engines.images import ImageLifecycle
from tests.twins.world import World

ORDER = ReadWeights("a", model("a", eviction=DISCARD), (0,))


class Reader:
    """Reads until it is cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.asked: list[tuple[str, str, str]] = []
        self.cancelled = 0

    async def read(
        self, model: str, model_path: str, env: Mapping[str, str], user: EngineUser | None
    ) -> None:
        self.asked.append((model, model_path, env["PATH"]))
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def images_with(reader: Reader | None, runtime: str) -> ImageLifecycle:
    drivers = replace(drivers_on(World(), runtime), weights=reader)
    return ImageLifecycle(drivers, lambda _: None, lambda _: None)


@in_loop
async def test_it_reads_until_it_is_not_needed() -> None:
    reader = Reader()
    with tempfile.TemporaryDirectory() as runtime:
        images = images_with(reader, runtime)
        images.read_weights(ORDER)
        await reader.begun.wait()
        assert reader.asked == [("a", "models/a", "/usr/bin")]
        images.end_reading("a")
        images.end_reading("a")
        await images.close()
    assert reader.cancelled == 1


@in_loop
async def test_it_ends_with_the_supervisor() -> None:
    reader = Reader()
    with tempfile.TemporaryDirectory() as runtime:
        images = images_with(reader, runtime)
        images.read_weights(ORDER)
        await reader.begun.wait()
        await images.close()
    assert reader.cancelled == 1


@in_loop
async def test_without_a_reader_nothing_is_read() -> None:
    with tempfile.TemporaryDirectory() as runtime:
        images = images_with(None, runtime)
        images.read_weights(ORDER)
        await images.close()
