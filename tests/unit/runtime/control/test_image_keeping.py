"""Images that operators remove, one by one or all that fit nothing any more."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from runtime_harness import OFFLOAD, config_of, in_loop, model
from test_verbs import Desk, desk

from llmux.config.schema import Config, Eviction, Process, Weights
from llmux.errors import Blame, CheckpointFailed, EngineUnhealthy, Reason
from tests.twins.disk import MemoryCheckpointer

CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)


def two() -> Config:
    return config_of(model("a", eviction=CHECKPOINT), model("b", eviction=CHECKPOINT))


async def parked(d: Desk, name: str) -> None:
    await d.ask("load", model=name)
    await d.ask("sleep", model=name)
    assert d.life.state_of(name) == "parked"


@in_loop
async def test_an_image_is_removed_and_the_model_that_was_in_it_is_stopped() -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        image = d.world.images["a"]
        result = await d.ask("image_remove", model="a")
        assert result == {
            "message": "The image of a is removed",
            "freed_bytes": image.disk_bytes,
        }
        await d.life.settled()
        assert "a" not in d.world.images
        assert d.life.state_of("a") == "stopped"
        assert (await d.model("a"))["image"] is None
        assert (await d.refusal("image_remove", model="a")).reason is Reason.NOT_FOUND


@in_loop
async def test_an_image_that_is_being_used_is_not_removed() -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        hold = d.world.hold("checkpointer.restore")
        loading = d.life.loop
        d.life.demand("a", waiting=1)
        await hold.reached.wait()
        assert loading.state.models["a"].state.value == "waking"
        assert (await d.refusal("image_remove", model="a")).reason is Reason.ALREADY_RUNNING
        assert (await d.ask("image_prune"))["removed"] == []
        hold.release()
        await d.life.until_state("a", "serving")


@in_loop
async def test_prune_removes_what_fits_nothing_and_keeps_what_does() -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        await parked(d, "b")
        d.world.images["a"] = replace(d.world.images["a"], identity={"model": "another"})
        d.world.images["gone"] = replace(d.world.images["b"], model="gone", path="/images/gone")
        result = await d.ask("image_prune")
        assert result["message"] == "removed 2 images"
        assert sorted(row["model"] for row in result["removed"]) == ["a", "gone"]
        assert list(d.world.images) == ["b"]
        assert (await d.ask("image_prune"))["message"] == "removed 0 images"


@in_loop
async def test_an_image_that_made_room_is_known_to_be_gone() -> None:
    async with desk(two()) as d:
        await parked(d, "b")
        assert (await d.model("b"))["image"] is not None
        checkpointer = d.life.drivers.checkpointer
        assert isinstance(checkpointer, MemoryCheckpointer)
        checkpointer.removed = ["b"]
        del d.world.images["b"]
        await parked(d, "a")
        await d.life.until(lambda state: state.models["b"].image is None)
        config = d.life.loop.state.models["b"].config
        assert "removed to make room" in d.life.images.why_cold(config)


@in_loop
async def test_a_cold_start_says_why_it_is_cold(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(model("a", eviction=CHECKPOINT), model("b", eviction=OFFLOAD))
    async with desk(config) as d:
        await d.ask("load", model="b")
        assert "Starting b cold (it is parked by offload+keep_running, which makes" in caplog.text
        await parked(d, "a")
        assert "Starting a cold (no checkpoint available)" in caplog.text
        d.world.fail("checkpointer.restore", CheckpointFailed(
            "restore", "a", "pages-1.img differs", blame=Blame.IMAGE
        ))  # fmt: skip
        await d.ask("load", model="a")
        await d.ask("unload", model="a")
        caplog.clear()
        await d.ask("load", model="a")
        assert "Starting a cold (its image failed: " in caplog.text
        assert "pages-1.img differs" in caplog.text


@in_loop
async def test_an_image_that_does_not_fit_any_more_is_named_by_the_cold_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with desk(two()) as d:
        await parked(d, "a")
        await d.ask("unload", model="a")
        d.world.images["a"] = replace(d.world.images["a"], identity={"model": "another"})
        caplog.clear()
        await d.ask("load", model="a")
        assert "Starting a cold (model differs)" in caplog.text
        assert d.life.images.why_cold(d.life.loop.state.models["a"].config) == "model differs"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), None])
@in_loop
async def test_one_image_that_cannot_be_read_hides_no_other(
    error: OSError | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with desk(two()) as d:
        for name in ("a", "b"):
            await parked(d, name)
        d.world.fail("checkpointer.find", error, model="a")
        configs = d.life.loop.state.config.models
        assert [known.model for known in await d.life.images.known(configs)] == ["b"]
        assert "cannot look for an image of a: " in caplog.text
        assert [known.model for known in await d.life.images.known(configs)] == ["a", "b"]


@pytest.mark.parametrize(
    ("blame", "kept"), [(Blame.IMAGE, False), (Blame.HOST, True), (Blame.ENGINE, True)]
)
@in_loop
async def test_only_an_image_that_is_to_blame_is_put_away(blame: Blame, kept: bool) -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        error = CheckpointFailed("restore", "a", "it fails", blame=blame)
        d.world.fail("checkpointer.restore", error)
        await d.ask("load", model="a")
        assert ("a" in d.world.images) is kept
        assert d.life.quarantined == ([] if kept else ["a"])


@in_loop
async def test_a_fault_of_ours_in_a_restore_blames_no_image(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        d.world.fail("checkpointer.restore", RuntimeError("can't start new thread"))
        await d.ask("load", model="a")
        assert "a" in d.world.images
        assert d.life.quarantined == []
        assert [line for line in caplog.messages if "can't start new thread" in line]


@pytest.mark.parametrize("fails", [True, False])
@in_loop
async def test_an_image_whose_engine_does_not_answer_as_before_is_put_away(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        d.world.fail("engine.canary", EngineUnhealthy("test", "a", "it says Rome"))
        if fails:
            d.world.fail("checkpointer.quarantine", OSError(28, "No space left on device"))
        await d.ask("load", model="a")
        (put_away,) = [c for c in d.world.calls if c.operation == "checkpointer.quarantine"]
        assert "it says Rome" in put_away.args[0]
        assert d.life.quarantined == ([] if fails else ["a"])
        said = "cannot quarantine the image of a: [Errno 28] No space left on device"
        assert (said in caplog.messages) is fails
        assert d.life.state_of("a") == "serving", "cold"


@in_loop
async def test_a_host_that_is_at_fault_after_the_restore_costs_no_image() -> None:
    async with desk(two()) as d:
        await parked(d, "a")
        no_room = CheckpointFailed("resume", "a", "the GPU has no room", blame=Blame.HOST)
        d.world.fail("cuda.resume", no_room)
        await d.ask("load", model="a")
        assert "a" in d.world.images and d.life.quarantined == []
