"""Freezer: the rules that the cgroup freezer and the twin keep alike."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rigs import DEADLINE, FREEZER_RIGS, Exits, units_rig

from llmux.drivers.processes.freezer import CgroupFreezer
from llmux.errors import FreezeFailed, Unsupported
from llmux.ports import UnitHandle


@pytest.mark.parametrize("kind", FREEZER_RIGS)
class TestFreezer:
    def test_frozen_and_thawed_any_number_of_times(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                assert not await rig.freezer.frozen(handle)
                for _ in range(2):
                    await rig.freezer.freeze(handle, DEADLINE)
                    await rig.freezer.freeze(handle, DEADLINE)
                    assert await rig.freezer.frozen(handle)
                    await rig.freezer.thaw(handle, DEADLINE)
                    await rig.freezer.thaw(handle, DEADLINE)
                    assert not await rig.freezer.frozen(handle)

        asyncio.run(body())

    @pytest.mark.parametrize("end", ["kill", "terminate"])
    def test_a_frozen_tree_can_be_ended(self, kind: str, tmp_path: Path, end: str) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                exits = Exits()
                rig.units.watch(handle, exits)
                await rig.freezer.freeze(handle, DEADLINE)
                if end == "kill":
                    await rig.units.kill(handle, DEADLINE)
                else:
                    assert await rig.units.terminate(handle, DEADLINE)
                await exits.next()
                assert list(await rig.units.observe()) == []

        asyncio.run(body())

    def test_what_is_gone_cannot_be_frozen_or_thawed(self, kind: str, tmp_path: Path) -> None:
        async def body() -> None:
            async with units_rig(kind, tmp_path) as rig:
                handle = await rig.units.start(rig.spec(), DEADLINE)
                await rig.units.kill(handle, DEADLINE)
                assert not await rig.freezer.frozen(handle)
                with pytest.raises(FreezeFailed, match="gone"):
                    await rig.freezer.freeze(handle, DEADLINE)
                with pytest.raises(FreezeFailed, match="gone"):
                    await rig.freezer.thaw(handle, DEADLINE)

        asyncio.run(body())


def test_without_a_cgroup_it_says_what_is_missing(tmp_path: Path) -> None:
    handle = UnitHandle("alpha", "llmux-alpha", 1, 1)
    with pytest.raises(Unsupported, match="embedded mode"):
        asyncio.run(CgroupFreezer().freeze(handle, 1.0))


def test_one_that_does_not_freeze_is_thawed_again(tmp_path: Path) -> None:
    """A directory that looks like a cgroup in which a process never stops."""
    engine = tmp_path / "llmux.slice/llmux-alpha.scope/engine"
    engine.mkdir(parents=True)
    for name, content in (
        ("cgroup.events", "populated 1\nfrozen 0\n"),
        ("cgroup.freeze", "0"),
        ("cgroup.procs", "1\n"),
    ):
        (engine / name).write_text(content)
    handle = UnitHandle("alpha", "llmux-alpha.scope", 1, 1, "/llmux.slice/llmux-alpha.scope")

    async def body() -> None:
        freezer = CgroupFreezer(str(tmp_path))
        with pytest.raises(FreezeFailed, match="not all of its 1 processes"):
            await freezer.freeze(handle, 0.02)
        await freezer.close()

    asyncio.run(body())
    assert (engine / "cgroup.freeze").read_text() == "0"
