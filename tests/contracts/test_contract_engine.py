"""Engine: the rules that vLLM's API (as the stand-in engine speaks it) and the twin keep alike."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rigs import DEADLINE, ENGINE_RIGS, engine_rig

from llmux.errors import DriverTimeout, EngineUnhealthy


@pytest.mark.parametrize("kind", ENGINE_RIGS)
class TestEngine:
    def test_where_nobody_listens(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = rig.address()
                assert not await rig.engine.healthy(address, DEADLINE)
                with pytest.raises(DriverTimeout, match="health"):
                    await rig.engine.wait_healthy(address, 0.02)
                with pytest.raises(EngineUnhealthy):
                    await rig.engine.sleeping(address, DEADLINE)
                with pytest.raises(EngineUnhealthy):
                    await rig.engine.wake(address, (), 0.2)

        asyncio.run(body())

    def test_it_describes_itself(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                assert await rig.engine.healthy(address, DEADLINE)
                about = await rig.engine.describe(address, DEADLINE)
                assert isinstance(about["version"], str)
                assert about["max_model_len"] > 0
                assert "/wake_up" in about["paths"]

        asyncio.run(body())

    def test_level_1_comes_back_as_it_was(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                before = await rig.engine.canary(address, "alpha", DEADLINE)
                assert "alpha" in before.text
                assert await rig.engine.sleeping(address, DEADLINE) is False
                await rig.engine.sleep(address, 1, DEADLINE)
                assert await rig.engine.sleeping(address, DEADLINE) is True
                assert await rig.engine.healthy(address, DEADLINE)
                await rig.engine.wake(address, (), DEADLINE)
                assert await rig.engine.sleeping(address, DEADLINE) is False
                assert await rig.engine.canary(address, "alpha", DEADLINE) == before

        asyncio.run(body())

    def test_a_sampled_request_is_answered_and_changes_nothing(
        self, kind: str, tmp_path: Path
    ) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                before = await rig.engine.canary(address, "alpha", DEADLINE)
                for _ in range(2):
                    await rig.engine.sample(address, "alpha", DEADLINE)
                assert await rig.engine.canary(address, "alpha", DEADLINE) == before

        asyncio.run(body())

    def test_level_2_needs_its_weights_again(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                before = await rig.engine.canary(address, "alpha", DEADLINE)
                await rig.engine.sleep(address, 2, DEADLINE)
                await rig.engine.wake(address, ("weights",), DEADLINE)
                await rig.engine.reload_weights(address, DEADLINE)
                await rig.engine.wake(address, ("kv_cache",), DEADLINE)
                await rig.engine.reset_prefix_cache(address, DEADLINE)
                assert await rig.engine.sleeping(address, DEADLINE) is False
                assert await rig.engine.canary(address, "alpha", DEADLINE) == before

        asyncio.run(body())

    def test_the_kv_cache_goes_and_comes_back_alone(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                before = await rig.engine.canary(address, "alpha", DEADLINE)
                await rig.engine.reset_prefix_cache(address, DEADLINE)
                for _ in range(2):
                    await rig.engine.discard_cache(address, DEADLINE)
                assert await rig.engine.sleeping(address, DEADLINE) is False
                for _ in range(2):
                    await rig.engine.return_cache(address, DEADLINE)
                assert await rig.engine.canary(address, "alpha", DEADLINE) == before

        asyncio.run(body())

    def test_a_request_without_its_kv_cache_fails(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                await rig.engine.discard_cache(address, DEADLINE)
                for ask in (rig.engine.sample, rig.engine.canary):
                    with pytest.raises(EngineUnhealthy):
                        await ask(address, "alpha", DEADLINE)

        asyncio.run(body())

    def test_level_2_without_a_reload_shows_in_the_canary(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                address = await rig.start()
                before = await rig.engine.canary(address, "alpha", DEADLINE)
                await rig.engine.sleep(address, 2, DEADLINE)
                await rig.engine.wake(address, (), DEADLINE)
                assert (await rig.engine.canary(address, "alpha", DEADLINE)).text != before.text

        asyncio.run(body())

    def test_a_wake_that_does_not_fit_says_out_of_memory(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with engine_rig(kind, tmp_path) as rig:
                alpha = await rig.start("alpha")
                await rig.engine.sleep(alpha, 1, DEADLINE)
                await rig.start("beta")
                with pytest.raises(EngineUnhealthy, match="out of memory"):
                    await rig.engine.wake(alpha, (), 0.3)  # no time for a second try
                assert await rig.engine.sleeping(alpha, DEADLINE) is True

        asyncio.run(body())
