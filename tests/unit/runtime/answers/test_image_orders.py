"""Orders on images: every field of their answers, what is asked for on the way, each refusal."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
from desks import desk
from runtime_harness import OFFLOAD, config_of, in_loop, model

from llmux.config.schema import Config, Eviction, Process, Weights
from llmux.core.events import ConfigChanged, ImageKnown
from llmux.errors import LlmuxError, Reason
from llmux.image_ports import Image
from llmux.runtime.control import checkpoints as module
from llmux.runtime.control.checkpoints import Checkpoints
from tests.twins.disk import MemoryCheckpointer
from tests.twins.world import GIB

DISCARD_CHECKPOINT = Eviction(Weights.DISCARD, Process.CHECKPOINT)
RETAIN_CHECKPOINT = Eviction(Weights.RETAIN, Process.CHECKPOINT)


def one(eviction: Eviction = DISCARD_CHECKPOINT, **settings: Any) -> Config:
    return config_of(model("a", eviction=eviction, **settings))


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is 1.2345 s after the last."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "monotonic", lambda: 100.0 + 1.2345 * next(ticks))
    monkeypatch.setattr(module, "time", lambda: 5000.06)


# ---- making --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("seconds")
@in_loop
async def test_an_image_is_made_once_and_each_field_says_what_it_cost() -> None:
    async with desk(one()) as d:
        made = await d.ask("checkpoint", model="a")
        fields = {
            "message": "Model a has an image in /images/a/current", "model": "a",
            "eviction": str(DISCARD_CHECKPOINT), "dump_secs": 1.0, "path": "/images/a/current",
            "apparent_bytes": 2 * GIB, "disk_bytes": GIB,
        }  # fmt: skip
        took = {"reused": False, "start_secs": 1.234, "checkpoint_secs": 1.234}
        assert made == fields | took
        asked = d.world.names("engine.canary", "checkpointer.check", "checkpointer.check_room")
        assert asked == [
            "checkpointer.check", "engine.canary a", "checkpointer.check_room a", "engine.canary a",
        ]  # fmt: skip
        d.world.calls.clear()
        again = await d.ask("checkpoint", model="a")
        nothing = {"reused": True, "start_secs": 0.0, "checkpoint_secs": 0.0}
        assert again == fields | nothing
        assert d.world.names() == ["checkpointer.find a"]


@pytest.mark.parametrize("warm_up", [True, False])
@in_loop
async def test_a_model_is_warmed_up_where_that_was_not_declined(warm_up: bool) -> None:
    async with desk(one(canary=False)) as d:
        await d.ask("checkpoint", model="a", warm_up=warm_up)
        assert d.world.names("engine.canary") == (["engine.canary a"] if warm_up else [])


@pytest.mark.parametrize(
    ("eviction", "bytes_asked"),
    [(DISCARD_CHECKPOINT, GIB // 10), (RETAIN_CHECKPOINT, GIB)],
    ids=str,
)
@in_loop
async def test_room_is_asked_for_what_the_image_holds_at_the_least(
    eviction: Eviction, bytes_asked: int
) -> None:
    async with desk(one(eviction)) as d:
        await d.ask("checkpoint", model="a")
        (call,) = [c for c in d.world.calls if c.operation == "checkpointer.check_room"]
        assert call.args == (bytes_asked,)


@in_loop
async def test_an_image_of_another_eviction_is_made_again() -> None:
    async with desk(one()) as d:
        await d.ask("checkpoint", model="a")
        image = d.world.images["a"]
        other = {**image.recipe, "eviction": str(RETAIN_CHECKPOINT)}
        d.world.images["a"] = replace(image, recipe=other)
        assert (await d.ask("checkpoint", model="a"))["reused"] is False


@in_loop
async def test_what_makes_no_image_is_refused_before_an_engine_starts() -> None:
    async with desk(config_of(model("a", eviction=DISCARD_CHECKPOINT), model("b"))) as d:
        refused = await d.refusal("checkpoint", model="b")
        assert refused.reason is Reason.BAD_REQUEST
        assert f"its eviction is {OFFLOAD}, which makes no image" in str(refused)
        refused = await d.refusal("checkpoint", model="b", eviction=str(RETAIN_CHECKPOINT))
        assert "the engine is started otherwise" in str(refused)
        assert f"set eviction to {RETAIN_CHECKPOINT} in the" in str(refused)
        d.world.criu_problems = ("criu is too old", "and slow")
        refused = await d.refusal("checkpoint", model="a")
        assert str(refused) == "cannot checkpoint a: criu is too old (llmux doctor)"
        for args in ({"warm_up": 1}, {"eviction": 7}, {"model": "x"}):
            await d.refusal("checkpoint", **({"model": "a"} | args))
        assert d.world.engines == {} and d.world.names("units.start") == []


@pytest.mark.parametrize("served", [True, False])
@in_loop
async def test_a_model_that_could_not_be_dumped_serves_on_if_it_did(served: bool) -> None:
    async with desk(one()) as d:
        if served:
            await d.ask("load", model="a")
        d.fail_dump_unharmed("a")
        with pytest.raises(LlmuxError, match=r"cannot checkpoint a: .*the disk is full"):
            await d.ask("checkpoint", model="a")
        await d.life.settled()
        assert d.life.state_of("a") == ("serving" if served else "parked")


@in_loop
async def test_an_image_that_is_gone_when_it_was_made_is_an_error() -> None:
    async with desk(one()) as d:
        d.vanish_after_dump("a")
        with pytest.raises(LlmuxError, match="cannot checkpoint a: no checkpoint available"):
            await d.ask("checkpoint", model="a")


# ---- restoring -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("seconds")
@in_loop
async def test_a_restore_says_what_serves_now_and_what_it_cost() -> None:
    async with desk(one()) as d:
        await d.ask("checkpoint", model="a")
        image = d.world.images["a"]
        d.world.images["a"] = replace(image, recipe={**image.recipe, "cold_seconds": 33.0004})
        assert await d.ask("restore", model="a") == {
            "message": "Model a serves, restored from /images/a/current", "model": "a",
            "restore_secs": 1.234, "cold_secs": 33.0, "answer": "a says Paris",
            "unit": "llmux-a.scope", "pid": image.root_pid,
            "address": f"unix:{d.life.drivers.places.runtime}/engines/a/api.sock",
            "path": "/images/a/current",
        }  # fmt: skip
        refused = await d.refusal("restore", model="a")
        assert refused.reason is Reason.ALREADY_RUNNING
        assert "it is serving" in str(refused)


@in_loop
async def test_a_restore_needs_an_image_and_a_model_that_is_not_there() -> None:
    async with desk(config_of(model("a", eviction=DISCARD_CHECKPOINT), model("b"))) as d:
        refused = await d.refusal("restore", model="a")
        assert refused.reason is Reason.NOT_FOUND
        assert str(refused) == "cannot restore a: no checkpoint available"
        await d.ask("load", model="b")
        await d.ask("sleep", model="b")
        refused = await d.refusal("restore", model="b")
        assert refused.reason is Reason.ALREADY_RUNNING
        assert "its processes are there, parked by another way" in str(refused)


@in_loop
async def test_an_image_that_came_after_the_start_is_restored_and_known() -> None:
    async with desk(one()) as d:
        await d.ask("checkpoint", model="a")
        await d.ask("unload", model="a")
        d.life.loop.post(ImageKnown("a", None))
        await d.life.settled()
        d.world.calls.clear()
        await d.ask("restore", model="a")
        assert d.world.names("units.start") == []
        record = d.life.loop.state.models["a"]
        assert (record.image, record.image_bytes) == (DISCARD_CHECKPOINT, GIB)


@in_loop
async def test_a_restore_that_becomes_a_cold_start_is_a_failure_with_its_reason() -> None:
    async with desk(one()) as d:
        await d.ask("checkpoint", model="a")
        d.world.fail("checkpointer.restore")
        with pytest.raises(LlmuxError, match=r"cannot restore a: .*fault.*; it was started cold"):
            await d.ask("restore", model="a")
        assert d.life.state_of("a") == "serving"


# ---- listing, removing ---------------------------------------------------------------------------


@pytest.mark.usefixtures("seconds")
@in_loop
async def test_a_listing_has_each_image_and_what_is_missing() -> None:
    path = "/elsewhere/c"
    models = [model(name, eviction=DISCARD_CHECKPOINT) for name in ("a", "b")]
    async with desk(config_of(*models, model("c", checkpoint_path=path), model("d"))) as d:
        assert [row["path"] for row in (await d.ask("images"))["images"]] == [path]
        for name in ("a", "b"):
            await d.ask("checkpoint", model=name)
        images = d.world.images
        images["a"] = replace(images["a"], created=4990.0, last_used=4998.0)
        images["b"] = replace(images["b"], identity={"model": "x"}, created=9e9, last_used=9e9)
        gone: Image = replace(images["a"], model="0", path="/images/0", managed=False, recipe={})
        images["0"] = gone
        row = {
            "model": "a", "path": "/images/a/current", "eviction": str(DISCARD_CHECKPOINT),
            "apparent_bytes": 2 * GIB, "disk_bytes": GIB, "created": 4990.0, "age_secs": 10.1,
            "last_used_secs": 2.1, "dump_secs": 1.0, "managed": True, "state": "valid",
        }  # fmt: skip
        young = {"created": 9e9, "age_secs": 0.0, "last_used_secs": 0.0}
        missing = dict.fromkeys(row) | {"managed": False}
        assert (await d.ask("images"))["images"] == [
            row | {"model": "0", "path": "/images/0", "eviction": "unknown", "managed": False,
                   "state": "the model is not configured"},
            row,
            row | young | {"model": "b", "path": "/images/b/current", "state": "model differs"},
            missing | {"model": "c", "path": path, "state": "no checkpoint available"},
        ]  # fmt: skip


@in_loop
async def test_only_images_of_our_own_are_removed_and_counted() -> None:
    async with desk(config_of(*(model(n, eviction=DISCARD_CHECKPOINT) for n in "ab"))) as d:
        for name in "ab":
            await d.ask("checkpoint", model=name)
            await d.ask("unload", model=name)
        images = d.world.images
        images["b"] = replace(images["b"], managed=False)
        refused = await d.refusal("image_remove", model="b")
        assert refused.reason is Reason.NOT_FOUND
        images["b"] = replace(images["b"], managed=True)
        images["other"] = replace(images["a"], managed=False, disk_bytes=5, path="/x")
        removed = await d.ask("image_remove", model="a")
        assert removed == {"message": "The image of a is removed", "freed_bytes": GIB}
        await d.life.settled()
        known = {name: one.image for name, one in d.life.loop.state.models.items()}
        assert known == {"a": None, "b": DISCARD_CHECKPOINT}
        images.pop("other")
        images["b"] = replace(images["b"], identity={})
        pruned = await d.ask("image_prune")
        assert (pruned["message"], pruned["freed_bytes"]) == ("removed 1 image", GIB)
        assert [row["model"] for row in pruned["removed"]] == ["b"]
        await d.life.settled()
        assert d.life.loop.state.models["b"].image is None


@in_loop
async def test_a_model_that_serves_is_not_stopped_with_its_image() -> None:
    async with desk(one()) as d:
        await d.ask("checkpoint", model="a")
        await d.ask("load", model="a")
        await d.ask("image_remove", model="a")
        await d.life.settled()
        assert d.life.state_of("a") == "serving"


@in_loop
async def test_without_scopes_there_are_no_images_and_each_verb_says_so() -> None:
    async with desk(one(OFFLOAD), checkpointer=None) as d:
        assert await d.ask("images") == {"images": []}
        for verb in ("image_remove", "image_prune"):
            with pytest.raises(LlmuxError, match="cannot keep images: engines are not in systemd"):
                await d.ask(verb, model="a")
        await d.ask("load", model="a")
        args = (d.life.loop, d.life.executor, d.life.images, d.life.drivers)
        await Checkpoints(*args).check_room("a", DISCARD_CHECKPOINT)
        refused = await d.refusal("sleep", model="a", eviction=str(DISCARD_CHECKPOINT))
        assert "images need llmux as a service" in str(refused)


@in_loop
async def test_where_nothing_can_be_checked_nothing_is_refused_ahead() -> None:
    async with desk(one(), checkpointer=None) as d:
        args = (
            d.life.loop,
            d.life.executor,
            d.life.images,
            replace(d.life.drivers, checkpointer=None),
        )
        await Checkpoints(*args).check_room("a", DISCARD_CHECKPOINT)
        await d.ask("load", model="a")
        await Checkpoints(*args).check_room("a", DISCARD_CHECKPOINT)
        await Checkpoints(*args)._check_means("a")
    async with desk(one()) as d:  # it has no engine yet
        args = (d.life.loop, d.life.executor, d.life.images, d.life.drivers)
        await Checkpoints(*args).check_room("a", DISCARD_CHECKPOINT)
        assert d.world.names("checkpointer.check_room", "units.memory_bytes") == []


@in_loop
async def test_a_model_that_is_removed_meanwhile_has_no_image() -> None:
    async with desk(config_of(model("a", eviction=DISCARD_CHECKPOINT), model("b"))) as d:
        await d.ask("load", model="a")
        dump = d.world.hold("checkpointer.dump")
        making = asyncio.create_task(d.ask("checkpoint", model="a"))
        await dump.reached.wait()
        d.life.loop.post(ConfigChanged(config_of(model("b"))))
        dump.release()
        with pytest.raises(LlmuxError, match="cannot checkpoint a: it is not configured any more"):
            await making


# ---- to and from other hosts ---------------------------------------------------------------------


@in_loop
async def test_the_host_describes_a_model_with_every_field() -> None:
    salt = "0" * 64
    async with desk(config_of(model("a", eviction=DISCARD_CHECKPOINT, port=4242))) as d:
        here = {
            "model": "a", "image": None, "reason": "no checkpoint available",
            "identity": {"model": "models/a"}, "portable": {"model": "models/a", "salt": salt},
            "runtime_dir": f"{d.life.drivers.places.runtime}/engines/a",
            "outputs": ["/images/a/stdout.log", "/images/a/stderr.log"], "uds": None,
            "port": 4242, "criu": "4.2.1",
        }  # fmt: skip
        assert await d.ask("image_here", model="a", salt=salt) == here
        await d.ask("checkpoint", model="a")
        found = {"image": "/images/a/current", "reason": None}
        assert await d.ask("image_here", model="a", salt=salt) == here | found
        for wrong in ("0" * 31, "0" * 30, "0" * 66, "0" * 33, "G" * 32, None, 7):
            refused = await d.refusal("image_here", model="a", salt=wrong)
            assert refused.reason is Reason.BAD_REQUEST
        assert (await d.ask("image_here", model="a", salt="f" * 32))["portable"]["salt"] == "f" * 32


@pytest.mark.parametrize(("gpus", "shown"), [(1, "0"), (2, "0,1"), ((0,), "0"), ((2, 3), "2,3")])
@in_loop
async def test_a_model_that_has_no_gpus_yet_is_described_on_those_it_would_get(
    gpus: Any, shown: str
) -> None:
    def portable(_config: Any, spec: Any, _salt: str) -> dict[str, str]:
        return {"gpus": spec.env["CUDA_VISIBLE_DEVICES"]}

    async with desk(one(gpus=gpus), portable_identity=portable) as d:
        here = await d.ask("image_here", model="a", salt="0" * 64)
        assert here["portable"] == {"gpus": shown}


@in_loop
async def test_an_image_that_arrived_is_answered_with_every_field() -> None:
    async with desk(one()) as d:
        await d.ask("checkpoint", model="a")
        await d.ask("unload", model="a")
        checkpointer = d.life.drivers.checkpointer
        assert isinstance(checkpointer, MemoryCheckpointer)
        d.world.arrived["a"] = replace(d.world.images.pop("a"), disk_bytes=77)
        assert await d.ask("image_adopt", model="a") == {
            "message": "Model a has an image in /images/a/current", "model": "a",
            "path": "/images/a/current", "eviction": str(DISCARD_CHECKPOINT),
            "apparent_bytes": 2 * GIB, "disk_bytes": 77,
        }  # fmt: skip
        await d.life.settled()
        assert d.life.loop.state.models["a"].image_bytes == 77
        hold = d.world.hold("units.start")
        del d.world.images["a"]
        d.life.demand("a", waiting=1)
        await hold.reached.wait()
        refused = await d.refusal("image_adopt", model="a")
        assert "the model is starting" in str(refused)
        hold.release()
        await d.life.settled()
