"""Who waits for a restore sees the bytes go by."""

from __future__ import annotations

from pathlib import Path

from runtime_harness import begin_life, config_of, in_loop, model

from llmux.config.schema import Eviction, Process, Weights
from llmux.runtime.control.orders import bring_down, bring_up, followed
from tests.twins.disk import MemoryStore
from tests.twins.world import World

CHECKPOINT = Eviction(Weights.RETAIN, Process.CHECKPOINT)


@in_loop
async def test_the_bytes_that_were_read_and_verified_are_told(tmp_path: Path) -> None:
    config = config_of(model("a", eviction=CHECKPOINT))
    life = await begin_life(config, World(), str(tmp_path), MemoryStore())
    reported: list[tuple[str, int, int]] = []

    def report(phase: str, _seconds: float, done: int, total: int) -> None:
        reported.append((phase, done, total))

    await bring_up(life.loop, "a")
    await bring_down(life.loop, "a", CHECKPOINT)
    assert life.state_of("a") == "parked"
    async with followed(life.loop, life.executor, "a", report):
        await bring_up(life.loop, "a")
    assert [done for phase, done, total in reported if phase == "restore" and 0 < done == total]
    await life.drop()
