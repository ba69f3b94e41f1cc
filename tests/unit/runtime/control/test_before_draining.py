"""An order that cannot be carried out is refused before anything is drained or stopped."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import pytest
from runtime_harness import Life, begin_life, config_of, in_loop, model
from test_verbs import Desk, desk

from llmux.config.schema import Eviction
from llmux.errors import CheckpointFailed, LlmuxError, Reason, Refused, TreeState
from llmux.runtime.control.verbs import Verbs
from tests.twins.disk import MemoryStore
from tests.twins.world import GIB, World

OFFLOADED = Eviction.parse("offload+checkpoint")
NO_ROOM = CheckpointFailed(
    "checkpoint", 'model "a"', "its image may take 7 bytes and / has 0 free", tree=TreeState.RUNNING
)


@in_loop
async def test_a_checkpoint_without_room_leaves_the_model_serving() -> None:
    async with desk(config_of(model("a", eviction=OFFLOADED))) as d:
        await d.ask("load", model="a")
        d.world.fail("checkpointer.check_room", NO_ROOM)
        with pytest.raises(LlmuxError, match="has 0 free"):
            await d.ask("checkpoint", model="a")
        assert d.life.state_of("a") == "serving"
        assert d.world.names("engine.sleep", "units.kill") == []
        (asked,) = [call for call in d.world.calls if call.operation == "checkpointer.check_room"]
        assert asked.args == (GIB,), "what its processes hold"
        assert (await d.ask("checkpoint", model="a"))["reused"] is False


@in_loop
async def test_without_a_criu_that_works_nothing_is_started_for_an_image() -> None:
    async with desk(config_of(model("a", eviction=OFFLOADED))) as d:
        d.world.criu_problems = ("criu is not installed",)
        refused = await d.refusal("checkpoint", model="a")
        assert str(refused) == "cannot checkpoint a: criu is not installed (llmux doctor)"
        assert d.world.names("units.start") == []


@pytest.mark.parametrize(("weights", "least"), [("offload", GIB), ("discard", GIB // 10)])
@in_loop
async def test_discarded_weights_are_in_no_image(weights: str, least: int) -> None:
    eviction = Eviction.parse(f"{weights}+checkpoint")
    async with desk(config_of(model("a", eviction=eviction))) as d:
        await d.ask("checkpoint", model="a")
        (asked,) = [call for call in d.world.calls if call.operation == "checkpointer.check_room"]
        assert asked.args == (least,)


async def without(life: Life, world: World, **drivers: None) -> Desk:
    """A desk on a host that lacks these drivers."""
    made = Desk(life, world)
    poor = replace(life.drivers, **drivers)  # type: ignore[arg-type]  # by name
    made.verbs = Verbs(life.loop, life.executor, life.images, poor, made._reload)
    return made


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("sleep", {"eviction": "retain+cuda_suspend"}),
        ("eviction_set", {"eviction": "retain+cuda_suspend"}),
        ("validate", {"policies": ["offload+keep_running", "retain+cuda_suspend"]}),
        ("sleep", {"eviction": "retain+checkpoint"}),
    ],
)
@in_loop
async def test_a_way_of_parking_that_this_host_has_no_means_for_is_refused(
    verb: str, args: dict[str, object]
) -> None:
    world = World()
    with tempfile.TemporaryDirectory() as runtime:
        life = await begin_life(config_of(model("a")), world, runtime, MemoryStore())
        d = await without(life, world, cuda=None, checkpointer=None)
        await d.ask("load", model="a")
        with pytest.raises(Refused, match="cannot park a by retain") as refused:
            await d.ask(verb, model="a", **args)
        assert refused.value.reason is Reason.BAD_REQUEST
        assert life.state_of("a") == "serving"
        assert world.names("engine.sleep", "units.kill") == []
        await life.drop()


@in_loop
async def test_a_model_that_served_before_it_was_validated_serves_again() -> None:
    async with desk(config_of(model("a"))) as d:
        await d.ask("load", model="a")
        d.world.fail("engine.sleep", nth=1)
        result = await d.ask("validate", model="a", policies=["discard+keep_running"])
        assert not result["passed"]
        await d.life.settled()
        assert d.life.state_of("a") == "serving"


@in_loop
async def test_a_missing_model_directory_fails_that_model_at_once_and_no_other() -> None:
    missing = replace(model("a"), model_path="/nonexistent/a")
    async with desk(config_of(missing, model("b"))) as d:
        refused = await d.refusal("load", model="a")
        assert str(refused) == (
            'cannot load a: cannot start model "a": /nonexistent/a does not exist (put the model'
            " there, or change models.a.model_path)"
        )
        assert d.world.names("units.start") == [], "nothing was spawned for it"
        assert (await d.model("a"))["why"].startswith('cannot start model "a": /nonexistent/a')
        await d.ask("load", model="b")
