"""An order that takes longer than all that it waits for may take is refused, and says so."""

from __future__ import annotations

import asyncio

import pytest
from runtime_harness import config_of, in_virtual_time, model
from test_verbs import desk

from llmux.config.schema import Eviction, Process, Weights
from llmux.errors import Reason, Refused

SMALL = {"gpu_memory": 0.3, "gpu_memory_parked": 0.0}
SHORT = {"sleep_timeout_secs": 1.0, "wake_timeout_secs": 1.0, "startup_timeout_secs": 10.0}


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("load", "cannot load c: not serving after 1[0-9] s"),
        ("sleep", "cannot park a: not parked after 122 s"),
        ("unload", "cannot park a: not parked after 122 s"),
    ],
)
@in_virtual_time
async def test_an_order_behind_a_start_that_takes_too_long(verb: str, said: str) -> None:
    """One memory transition at a time on a GPU: both orders wait for b, which loads for an hour."""
    models = (
        model("a", **SMALL, **SHORT),
        model("b", **SMALL, **SHORT | {"startup_timeout_secs": 3600.0}),
        model("c", **SMALL, **SHORT),
    )
    async with desk(config_of(*models, drain_timeout_secs=1.0)) as d:
        await d.ask("load", model="a")
        held = d.world.hold("engine.wait_healthy", model="b")
        loading = asyncio.create_task(d.ask("load", model="b"))
        await d.life.until_state("b", "starting")
        with pytest.raises(Refused, match=said) as refused:
            await d.ask(verb, model="c" if verb == "load" else "a")
        assert refused.value.reason is Reason.WAIT_EXPIRED
        held.release()
        await loading
        assert d.life.state_of("b") == "serving"


@in_virtual_time
async def test_an_order_waits_as_long_as_a_dump_may_take() -> None:
    """Before, it was refused after two minutes and the sleep's own limit, and the dump went on."""
    checkpoint = Eviction(Weights.OFFLOAD, Process.CHECKPOINT)
    slow = model("a", eviction=checkpoint, checkpoint_timeout_secs=3600.0, **SHORT)
    async with desk(config_of(slow, drain_timeout_secs=1.0)) as d:
        await d.ask("load", model="a")
        held = d.world.hold("checkpointer.dump")
        sleeping = asyncio.create_task(d.ask("sleep", model="a"))
        await held.reached.wait()
        await asyncio.sleep(3000.0)
        held.release()
        await sleeping
        assert d.life.state_of("a") == "parked"
