"""``status --json`` is what its schema says: every field, with its type, and no other."""

from __future__ import annotations

from runtime_harness import config_of, in_loop, model
from test_verbs import desk

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.states import ModelState
from tests.json_shape import faults, schema

STATUS = schema("status.schema.json")
OUTPUTS = schema("outputs.schema.json")["$defs"]


@in_loop
async def test_status_is_as_described_in_every_state() -> None:
    async with desk(config_of(model("a"), model("b"))) as d:
        assert faults(STATUS, await d.ask("status")) == []
        await d.ask("pin", models=["a"], seconds=60)
        assert faults(STATUS, await d.ask("status")) == []
        await d.ask("unpin")
        await d.ask("sleep", model="a")
        held = d.world.hold("engine.wait_healthy")
        d.life.demand("b", waiting=1)
        await held.reached.wait()
        d.life.executor.heard("b", "Loading safetensors checkpoint shards: 25% Completed | 1/4 [")
        status = await d.ask("status")
        assert status["models"]["b"]["progress"] is not None
        assert faults(STATUS, status) == []
        held.release()
        await d.life.settled()
        d.world.fail("units.start")
        await d.ask("unload", model="a")
        await d.refusal("load", model="a")
        status = await d.ask("status")
        assert status["models"]["a"]["state"] == "failed"
        assert faults(STATUS, status) == []


def test_a_field_that_is_not_described_is_seen() -> None:
    assert faults(STATUS["properties"]["models"], {"a": {"new": 1}})


def test_the_schema_has_every_state() -> None:
    one = STATUS["properties"]["models"]["additionalProperties"]["properties"]
    assert set(one["state"]["enum"]) == {state.value for state in ModelState}


@in_loop
async def test_what_is_said_of_images_is_as_described() -> None:
    async with desk(
        config_of(model("a", eviction=Eviction(Weights.DISCARD, Process.CHECKPOINT)))
    ) as d:
        made = await d.ask("checkpoint", model="a")
        listed = (await d.ask("images"))["images"]
        restored = await d.ask("restore", model="a")
        removed = {"a": await d.ask("image_remove", model="a")}
        pruned = await d.ask("image_prune")
    assert len(listed) == 1
    for name, value in (
        ("checkpoint", made), ("images", listed), ("restore", restored),
        ("images_rm", removed), ("images_prune", pruned),
    ):  # fmt: skip
        assert faults(OUTPUTS[name], value) == [], name
