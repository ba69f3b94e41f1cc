"""Images as the executor uses them: each call of the checkpointer, what is kept, what is posted."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from drivers_called import ADDRESS, CHECKPOINT, CONFIG, HANDLE, Bench
from runtime_harness import OFFLOAD, STOP, in_loop

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.effects import ReadAhead, ReadWeights
from llmux.core.events import ImageKnown
from llmux.core.plans import park_plan, reuse_plan
from llmux.errors import Blame, CheckpointFailed, LlmuxError, Unsupported
from llmux.image_ports import NONE_MADE, DumpPhase, DumpSpec, Image, Interrupted, NoImage
from llmux.protocol import Address
from llmux.runtime.engines.facts import EngineFacts, Recipe, eviction_of
from llmux.runtime.engines.images import ImageLifecycle, patience
from llmux.runtime.engines.instance import Step as Progressing
from llmux.typed_json import BadJson

FACTS = EngineFacts(
    address=ADDRESS, identity={"model": "m"}, gpus=(1,), cold_seconds=33.0, cuda_pids=(7,),
    cuda_bytes=9, version="1", max_model_len=5, started_as="x", resumed=True, cache_discarded=True,
)  # fmt: skip
IMAGE = Image(
    model="a", path="/i/a", identity={"model": "m"}, recipe=Recipe(CHECKPOINT, FACTS).to_json(),
    created=1.0, dump_seconds=2.0, root_pid=77, apparent_bytes=6_000_000_000, disk_bytes=5,
)  # fmt: skip
SPEC_DIRECTORY = "/run/engines/a"


class Store(Bench):
    """``found``: what the checkpointer finds."""

    def __init__(self, found: Image | NoImage = IMAGE, **answers: Any) -> None:
        super().__init__(checkpointer_find=found, **answers)
        self.quarantined: list[str] = []
        self.made_images()

    def made_images(self) -> ImageLifecycle:
        self.images = ImageLifecycle(self.drivers, self.told.append, self.quarantined.append)
        return self.images

    def asked(self, port: str = "checkpointer") -> list[Any]:
        return [call for call in self.seen if call[0].startswith(f"{port}.")]


@pytest.mark.parametrize(
    ("deadline", "size", "seconds"),
    [(900.0, 0, 60.0), (900.0, 100_000_000, 62.0), (61.0, 100_000_000, 61.0), (5.0, 0, 5.0)],
)
def test_a_deadline_grows_with_the_size_up_to_what_is_configured(
    deadline: float, size: int, seconds: float
) -> None:
    assert patience(deadline, size) == seconds


# ---- finding -------------------------------------------------------------------------------------


@in_loop
async def test_an_image_is_looked_for_by_name_identity_and_path_and_its_lack_explained() -> None:
    config = replace(CONFIG, checkpoint_path="/p")
    bench = Store()
    assert await bench.images.find(config, (0,)) is IMAGE
    assert bench.asked() == [("checkpointer.find", "a", {"model": "m"}, "/p")]
    reasons = []
    for found in (NoImage("it is damaged"), NoImage(NONE_MADE), IMAGE, NoImage(NONE_MADE)):
        bench.answers["checkpointer.find"] = found
        assert await bench.images.find(config, (0,)) == found
        reasons.append(bench.images.why_cold(config))
    assert reasons == ["it is damaged", "it is damaged", NONE_MADE, NONE_MADE]
    other = replace(CONFIG, eviction=OFFLOAD)
    assert bench.images.why_cold(other) == f"it is parked by {OFFLOAD}, which makes no image"
    assert bench.images.why_cold(replace(other, checkpoint_path="/p")) == NONE_MADE
    bench.without(checkpointer=None)
    with pytest.raises(Unsupported, match="they are not in systemd scopes here"):
        await bench.made_images().find(config, (0,))


@pytest.mark.parametrize(
    ("eviction", "keep", "found", "reused"),
    [
        (CHECKPOINT, True, IMAGE, True),
        (CHECKPOINT, False, IMAGE, False),
        (CHECKPOINT, True, NoImage("none"), False),
        (Eviction(Weights.RETAIN, Process.CHECKPOINT), True, IMAGE, False),
        (OFFLOAD, True, IMAGE, False),
        (STOP, True, IMAGE, False),
    ],
)
@in_loop
async def test_a_park_is_shortened_by_an_image_of_the_same_eviction(
    eviction: Eviction, keep: bool, found: Image | NoImage, reused: bool
) -> None:
    bench = Store(found)
    bench.without(keep_images=keep)
    bench.instance.facts = FACTS
    plan = park_plan(CONFIG, eviction)
    shorter = await bench.made_images().shorten(plan, bench.instance)
    assert shorter == (reuse_plan(CONFIG, eviction) if reused else plan)
    assert bench.told == ([ImageKnown("a", eviction, 5)] if reused else [])
    looked = eviction.process is Process.CHECKPOINT and keep
    assert bench.asked() == ([("checkpointer.find", "a", {"model": "m"}, None)] if looked else [])


@in_loop
async def test_images_that_can_be_restored_are_known_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bench = Store()
    assert await bench.images.known({"a": CONFIG}) == [ImageKnown("a", CHECKPOINT, 5)]
    bench.answers["checkpointer.find"] = replace(IMAGE, recipe={})
    assert await bench.images.known({"a": replace(CONFIG, gpus=2)}) == []
    for found, lines in ((NoImage("it is old"), ["a: it is old"]), (NoImage(""), [])):
        caplog.clear()
        bench.answers["checkpointer.find"] = found
        assert await bench.images.known({"a": CONFIG}) == []
        assert caplog.messages == lines
    bench.without(checkpointer=None)
    assert await bench.made_images().known({"a": CONFIG}) == []
    await bench.images.recover()


# ---- dumping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [True, False])
@in_loop
async def test_a_dump_is_given_all_that_is_known_and_what_made_room_is_told(fails: bool) -> None:
    error = CheckpointFailed("dump", "a", "the disk is full")
    bench = Store(checkpointer_precheck=100_000_000, checkpointer_dump=error if fails else IMAGE)
    bench.answers["checkpointer.take.removed"] = None
    checkpointer: Any = bench.drivers.checkpointer
    checkpointer.take_removed = lambda: ["b", "c"]
    bench.instance.facts = FACTS
    bench.images._why_cold["a"] = "its image was removed"
    try:
        await bench.images.dump(bench.instance, CHECKPOINT, 900.0)
    except CheckpointFailed:
        assert fails
    _, handle, spec, limit, report = bench.asked()[-1]
    assert bench.asked()[-2] == ("checkpointer.precheck", HANDLE)
    assert isinstance(spec, DumpSpec)
    assert (handle, limit, report) == (HANDLE, 62.0, bench.instance.report)
    assert (spec.identity, spec.cold_seconds) == ({"model": "m"}, 33.0)
    assert (
        spec.launch == bench.images.spec(CONFIG, (1,))
        and spec.launch.env["CUDA_VISIBLE_DEVICES"] == "1"
    )
    assert Recipe.from_json(spec.recipe) == Recipe(CHECKPOINT, FACTS)
    gone: list[Any] = [ImageKnown("b", None), ImageKnown("c", None)]
    made = [ImageKnown("a", CHECKPOINT, 5)]
    assert bench.told == gone + ([] if fails else made)
    assert "removed to make room" in bench.images.why_cold(replace(CONFIG, name="b"))
    assert bench.images.why_cold(CONFIG) == ("its image was removed" if fails else NONE_MADE)
    ended = [("units.unwatch", HANDLE), ("output.detach", "a")]
    assert [call for call in bench.seen if call in ended] == ([] if fails else ended)
    assert (bench.instance.handle is None) is not fails
    bench.instance.handle = None
    with pytest.raises(CheckpointFailed, match="it has no engine"):
        await bench.images.dump(bench.instance, CHECKPOINT, 900.0)


# ---- restoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("gpus", [(), (3,)])
@in_loop
async def test_a_restore_brings_back_the_engine_with_the_facts_of_its_image(
    ahead: bool, gpus: tuple[int, ...]
) -> None:
    bench, taken = Store(checkpointer_restore=HANDLE), list[Any]()
    bench.instance.facts = EngineFacts(cold_seconds=1.0)

    async def take_over(image: Image, spec: Any) -> Any:
        taken.append((image, spec))
        return HANDLE if ahead else None

    assert await bench.images.restore(bench.instance, gpus, 900.0, take_over) is IMAGE
    spec = bench.images.spec(CONFIG, gpus)
    assert taken == [(IMAGE, spec)]
    restores = [call for call in bench.asked() if call[0] == "checkpointer.restore"]
    if ahead:
        assert restores == []
    else:
        (call,) = restores
        assert call[1:4] == (IMAGE, spec, 180.0)
        call[4](DumpPhase.PACK, 3, 7)
        step = bench.instance.step
        assert isinstance(step, Progressing) and (step.name, step.done, step.total) == (
            "restore", 3, 7,
        )  # fmt: skip
    assert bench.asked()[-1] == ("checkpointer.confirm_restore", "a")
    assert bench.instance.handle == HANDLE
    assert bench.instance.facts == replace(FACTS, gpus=gpus or (1,))
    assert bench.told == []


@in_loop
async def test_an_image_without_an_address_gets_the_configured_one() -> None:
    recipe = Recipe(CHECKPOINT, replace(FACTS, address=None)).to_json()
    bench = Store(replace(IMAGE, recipe=recipe), checkpointer_restore=HANDLE)
    await bench.images.restore(bench.instance, (), 900.0, nothing_ahead)
    assert bench.instance.facts.address == Address(uds=f"{SPEC_DIRECTORY}/api.sock")


async def nothing_ahead(*_: Any) -> None:
    return None


@pytest.mark.parametrize("blame", list(Blame))
@in_loop
async def test_a_restore_that_fails_puts_away_the_image_that_is_to_blame(blame: Blame) -> None:
    error = CheckpointFailed("restore", "a", "it is odd", blame=blame)
    bench = Store(checkpointer_restore=error, checkpointer_quarantine="/q")
    with pytest.raises(CheckpointFailed, match="it is odd"):
        await bench.images.restore(bench.instance, (), 900.0, nothing_ahead)
    bad = blame is Blame.IMAGE
    assert bench.quarantined == ["a"] * bad
    assert bench.told == [ImageKnown("a", None)] * bad
    put_away = [call for call in bench.asked() if call[0] == "checkpointer.quarantine"]
    assert put_away == [("checkpointer.quarantine", IMAGE, str(error))] * bad
    why = bench.images.why_cold(CONFIG)
    assert why == (f"its image failed: {error}" if bad else NONE_MADE)
    assert await bench.images.blamed(None, error) is False
    assert await bench.images.blamed(IMAGE, error) is bad


@in_loop
async def test_without_an_image_or_with_a_damaged_recipe_nothing_is_restored() -> None:
    bench = Store(NoImage("it is old"))
    with pytest.raises(CheckpointFailed, match="it is old"):
        await bench.images.restore(bench.instance, (), 900.0, nothing_ahead)
    assert (bench.told, bench.quarantined) == ([ImageKnown("a", None)], [])
    bench = Store(replace(IMAGE, recipe={"eviction": "x"}))
    with pytest.raises(CheckpointFailed, match="eviction: ") as failed:
        await bench.images.restore(bench.instance, (), 900.0, nothing_ahead)
    assert (failed.value.blame, bench.quarantined) == (Blame.IMAGE, ["a"])
    assert "its recipe is damaged: eviction: " in bench.images.why_cold(CONFIG)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("managed", [True, False])
@in_loop
async def test_an_image_that_served_is_removed_where_none_is_kept_and_it_is_ours(
    keep: bool, managed: bool
) -> None:
    bench = Store()
    bench.without(keep_images=keep)
    await bench.made_images().served(replace(IMAGE, managed=managed))
    gone = not keep and managed
    assert bench.asked() == [("checkpointer.discard", "a")] * gone
    assert bench.told == [ImageKnown("a", None)] * gone


@in_loop
async def test_engines_of_interrupted_operations_end_and_only_a_restore_is_confirmed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = replace(HANDLE, model="b", unit="llmux-b.scope")
    third = replace(HANDLE, model="c", unit="llmux-c.scope")
    bench = Store(
        checkpointer_recover=[
            Interrupted("a", "llmux-a.scope", "dump", ("x",)),
            Interrupted("b", "llmux-b.scope", "restore", ("y", "z")),
        ],
        units_observe=[HANDLE, third, other],
    )
    await bench.images.recover()
    assert bench.asked("units")[1:] == [("units.kill", HANDLE, 15.0), ("units.kill", other, 15.0)]
    assert bench.asked()[1:] == [
        ("checkpointer.remove_shm", "a", ("x",)), ("checkpointer.remove_shm", "b", ("y", "z")),
        ("checkpointer.confirm_restore", "b"),
    ]  # fmt: skip
    assert caplog.messages == [
        "a: its dump was interrupted: engine ended", "b: its restore was interrupted: engine ended"
    ]  # fmt: skip


# ---- reading ahead -------------------------------------------------------------------------------


async def settled() -> None:
    while len(asyncio.all_tasks()) > 1:
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})


@pytest.mark.parametrize("error", [None, LlmuxError("x"), OSError(5, "x")])
@in_loop
async def test_an_image_is_read_ahead_once_at_a_time(error: Exception | None) -> None:
    bench = Store(checkpointer_read_ahead=error)
    effect = ReadAhead("a", CONFIG, (2,))
    bench.images.read_ahead(effect)
    bench.images.read_ahead(effect)
    await settled()
    reads = [call for call in bench.asked() if call[0] == "checkpointer.read_ahead"]
    assert reads == [("checkpointer.read_ahead", IMAGE)]
    bench.images.read_ahead(effect)
    await settled()
    assert len([c for c in bench.asked() if c[0] == "checkpointer.read_ahead"]) == 2
    bench.answers["checkpointer.find"] = NoImage("none")
    bench.images.read_ahead(effect)
    await settled()
    assert len([c for c in bench.asked() if c[0] == "checkpointer.read_ahead"]) == 2
    bench.without(checkpointer=None)
    bench.made_images().read_ahead(effect)
    assert len(asyncio.all_tasks()) == 1


@in_loop
async def test_weights_are_read_until_that_ends_and_a_new_order_replaces_the_last() -> None:
    bench, reading, said = Store(), asyncio.Queue[Any](), list[Any]()

    class Reader:
        async def read(self, *args: Any) -> None:
            reading.put_nowait(args)
            try:
                await asyncio.Event().wait()
            finally:
                reading.put_nowait("ended")

    effect = ReadWeights("a", replace(CONFIG, env=MappingProxyType({"X": "1"})), (2,))
    bench.images.read_weights(effect)
    assert len(asyncio.all_tasks()) == 1, "none reads"
    bench.without(weights=Reader())
    images = bench.made_images()

    async def until(count: int) -> None:
        while len(said) < count:
            said.append(await reading.get())

    images.read_weights(effect)
    await until(1)
    name, path, env, user = said[0]
    assert (name, path, user) == ("a", CONFIG.model_path, None)
    assert (env["X"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "2")
    images.read_weights(effect)
    await until(3)
    assert sorted(said[1:], key=str) == sorted(["ended", said[0]], key=str)
    images.end_reading("a")
    images.end_reading("a")
    await until(4)
    images.read_weights(effect)
    await until(5)
    await images.close()
    assert reading.get_nowait() == "ended" and len(asyncio.all_tasks()) == 1


def test_a_recipe_is_read_as_it_is_written_and_a_damaged_one_is_none() -> None:
    assert Recipe.from_json(IMAGE.recipe) == Recipe(CHECKPOINT, FACTS)
    assert eviction_of(IMAGE.recipe) == CHECKPOINT
    damages: list[dict[str, Any]] = [
        {"eviction": None}, {"port": 0}, {"port": 65536}, {"port": -1}, {"cuda_pids": [0]},
        {"cuda_pids": [-1]}, {"gpus": [-1]}, {"cold_seconds": "x"}, {"resumed": 1},
    ]  # fmt: skip
    for damage in damages:
        document = {**IMAGE.recipe, **damage}
        assert eviction_of(document) is None, damage
        with pytest.raises(BadJson):
            Recipe.from_json(document)
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"port": 1}, {"address": Address(port=1)}),
        ({"port": 65535}, {"address": Address(port=65535)}),
        ({"uds": "/x"}, {"address": Address(uds="/x")}), ({"port": None}, {"address": None}),
        ({"gpus": [0]}, {"gpus": (0,)}), ({"cuda_pids": [1]}, {"cuda_pids": (1,)}),
        ({"cuda_bytes": -5}, {"cuda_bytes": 0}), ({"cold_seconds": 0.0}, {"cold_seconds": 60.0}),
    ]  # fmt: skip
    for change, facts in changes:
        read = EngineFacts.from_json({**IMAGE.recipe, **change})
        assert read == replace(FACTS, **facts), change
    assert EngineFacts.from_json({}) == EngineFacts()
