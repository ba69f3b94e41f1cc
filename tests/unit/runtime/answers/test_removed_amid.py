"""A reload removes a model while an order for it is under way: the order says so."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from desks import Desk, desk
from runtime_harness import STOP, config_of, in_loop, model

from llmux.config.schema import Eviction
from llmux.core.events import ConfigChanged
from llmux.errors import LlmuxError

IMAGE = Eviction.parse("discard+checkpoint")
CONFIG = config_of(
    model("a", gpu_memory=0.4, eviction=IMAGE), model("b", gpu_memory=0.4, eviction=IMAGE)
)


async def remove_amid(d: Desk, verb: str, args: Any, step: str, removed: str = "a") -> Any:
    """The answer of an order amid whose ``step`` the model is removed."""
    hold = d.world.hold(step)
    task = asyncio.create_task(d.ask(verb, **args))
    reached = asyncio.create_task(hold.reached.wait())
    await asyncio.wait([task, reached], return_when=asyncio.FIRST_COMPLETED)
    assert reached.done(), f"{verb} has no step {step}"
    left = {name: config for name, config in CONFIG.models.items() if name != removed}
    d.life.loop.post(ConfigChanged(replace(CONFIG, models=MappingProxyType(left))))
    for _ in range(20):
        await asyncio.sleep(0)
    hold.release()
    return await task


@pytest.mark.parametrize(
    ("verb", "args", "step"),
    [
        ("sleep", {}, "engine.sleep"),
        ("load", {}, "engine.canary"),
        ("load", {}, "units.start"),
        ("checkpoint", {}, "checkpointer.dump"),
        ("checkpoint", {}, "engine.sleep"),
        ("validate", {"policies": [str(STOP)]}, "units.terminate"),
        ("validate", {"policies": ["offload+keep_running"]}, "engine.sleep"),
        ("validate", {"policies": ["offload+keep_running"]}, "engine.wake"),
    ],
)
@in_loop
async def test_an_order_for_it_ends_with_the_reason(verb: str, args: Any, step: str) -> None:
    async with desk(CONFIG) as d:
        if verb != "load":
            await d.ask("load", model="a")
        try:
            said = str(await remove_amid(d, verb, {"model": "a", **args}, step))
        except LlmuxError as error:
            said = str(error)
        assert "removed" in said or "not configured any more" in said, said
        assert "internal" not in said and "KeyError" not in said


@in_loop
async def test_an_unload_has_what_it_wants() -> None:
    async with desk(CONFIG) as d:
        await d.ask("load", model="a")
        answer = await remove_amid(d, "unload", {"model": "a"}, "units.terminate")
        assert answer == {"message": "Model a is stopped"}
        assert set(d.life.loop.state.models) == {"b"}


@pytest.mark.parametrize("removed", ["a", "b"])
@in_loop
async def test_a_restart_goes_on_with_the_others(removed: str) -> None:
    async with desk(CONFIG) as d:
        for name in "ab":
            await d.ask("load", model=name)
        answer = await remove_amid(d, "restart", {"models": ["a", "b"]}, "units.terminate", removed)
        left = "ab".replace(removed, "")
        assert answer == {"message": f"restarted: {left}", "restarted": [left], "stopped": []}
