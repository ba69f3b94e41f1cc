"""What the supervisor answers to `llmux images`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from runtime_harness import config_of, in_loop, model
from test_verbs import Desk, desk

from llmux.config.schema import Eviction, Process, Weights
from llmux.errors import CheckpointFailed, Reason
from llmux.image_ports import NONE_MADE, Image
from tests.json_shape import faults, schema

OUTPUTS = schema("outputs.schema.json")["$defs"]
CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
SALT = "0" * 32


async def made_image(d: Desk) -> Image:
    await d.ask("load", model="a")
    await d.ask("sleep", model="a", eviction=str(CHECKPOINT))
    return d.world.images["a"]


@in_loop
async def test_the_host_describes_a_model_and_its_image() -> None:
    async with desk(config_of(model("a", eviction=CHECKPOINT))) as d:
        here = await d.ask("image_here", model="a", salt=SALT)
        assert here["image"] is None
        assert here["reason"] == NONE_MADE
        assert here["identity"] == {"model": "models/a"}
        assert here["portable"] == {"model": "models/a", "salt": SALT}
        assert here["uds"].endswith("/engines/a/api.sock")
        image = await made_image(d)
        assert (await d.ask("image_here", model="a", salt=SALT))["image"] == image.path
        for salt in (None, 7, "xyz", "0" * 33):
            assert (
                await d.refusal("image_here", model="a", salt=salt)
            ).reason is Reason.BAD_REQUEST


@in_loop
async def test_an_image_that_arrived_is_what_the_model_wakes_from() -> None:
    async with desk(config_of(model("a", eviction=CHECKPOINT))) as d:
        image = await made_image(d)
        await d.ask("unload", model="a")
        del d.world.images["a"]
        with pytest.raises(CheckpointFailed):
            await d.ask("image_adopt", model="a")
        d.world.arrived["a"] = image
        adopted = await d.ask("image_adopt", model="a")
        assert adopted["path"] == image.path
        assert faults(OUTPUTS["images_import"], {**adopted, "warnings": []}) == []
        await d.life.settled()
        assert d.life.loop.state.models["a"].image == CHECKPOINT
        d.world.calls.clear()
        await d.ask("load", model="a")
        assert d.world.names("checkpointer.restore") == ["checkpointer.restore a"]


@pytest.mark.parametrize("recipe", [{}, {"eviction": ""}])
@in_loop
async def test_how_an_image_was_made_may_be_unknown(recipe: dict[str, str]) -> None:
    async with desk(config_of(model("a", eviction=CHECKPOINT))) as d:
        image = await made_image(d)
        await d.ask("unload", model="a")
        d.world.arrived["a"] = replace(image, recipe=recipe)
        assert (await d.ask("image_adopt", model="a"))["eviction"] == "unknown"


@in_loop
async def test_an_image_in_use_is_not_replaced() -> None:
    async with desk(config_of(model("a", eviction=CHECKPOINT))) as d:
        image = await made_image(d)
        d.world.arrived["a"] = image
        hold = d.world.hold("checkpointer.restore")
        loading = asyncio.create_task(d.ask("load", model="a"))
        await d.life.until_state("a", "waking")
        assert (await d.refusal("image_adopt", model="a")).reason is Reason.ALREADY_RUNNING
        hold.release()
        await loading
