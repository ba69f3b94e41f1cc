"""Every number of the supervisor, and each look of one who asks for memory, alone in failing."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import (
    OFFLOAD,
    STOP,
    Shop,
    config_of,
    drivers_on,
    in_loop,
    in_virtual_time,
    model,
)

from llmux import metrics
from llmux.config.schema import CheckpointConfig, Config
from llmux.core.effects import SwitchFinished
from llmux.core.plans import start_plan
from llmux.core.records import Failed, ModelRecord, Parked, Serving, State, Stopped
from llmux.errors import LlmuxError
from llmux.image_ports import Image
from llmux.metrics import METRICS, Store
from llmux.protocol import Collected
from llmux.runtime.control.holdings import Gpu, Held, Holdings
from llmux.runtime.control.telemetry import Telemetry
from llmux.runtime.control.warmup import to_warm
from llmux.runtime.control.watchers import Watchers
from tests.twins.world import GIB, World

A, B = model("a", gpu_memory=0.4), model("b", gpu_memory=0.4)


def telemetry_on(world: World, *, images: bool = True, ours: frozenset[int] = frozenset()) -> Any:
    drivers = drivers_on(world, "/run")

    async def engines() -> frozenset[int]:
        return ours

    kept = drivers.checkpointer if images else None
    return Telemetry("1.2", drivers.gpu, kept, engines)


def state_of(config: Config, *records: ModelRecord) -> State:
    models = {record.config.name: record for record in records}
    return State(config, 1, "e", models=MappingProxyType(models))


def image_of(name: str, size: int) -> Image:
    return Image(name, f"/images/{name}", {}, {}, 0.0, 0.0, 1, 2 * size, size)


def series(found: Any, name: str) -> dict[tuple[str, ...], Any]:
    """Labels → number, or (count, sum) of a histogram."""
    values = {tuple(labels): value for labels, value in found.get(name, [])}
    if METRICS[name].kind is not metrics.Kind.HISTOGRAM:
        return values
    return {labels: (sum(counts), total) for labels, (counts, total) in values.items()}


# ---- the supervisor's numbers --------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 7 * GIB])
@in_loop
async def test_every_model_has_each_number_from_the_first_look(budget: int | None) -> None:
    config = replace(config_of(A, B, max_wait_secs=45.0), checkpoint=CheckpointConfig())
    config = replace(config, checkpoint=replace(config.checkpoint, max_bytes=budget))
    telemetry = telemetry_on(World())
    records = ModelRecord(A, Serving("e", 0.0)), ModelRecord(B, Failed(0.0, 1.0, "x"), failures=3)
    telemetry.published(state_of(config), state_of(config, *records))
    found = await telemetry.snapshot()
    states = series(found, metrics.MODEL_STATE)
    assert [labels for labels, value in states.items() if value] == [
        ("a", "serving"), ("b", "failed")
    ]  # fmt: skip
    assert set(states.values()) == {0, 1}
    assert series(found, metrics.MODEL_FAILURES) == {("a",): 0, ("b",): 3}
    for counter in (metrics.ENGINE_DEATHS, metrics.QUARANTINED):
        assert series(found, counter) == {("a",): 0, ("b",): 0}
    operations = {(name, operation): 0 for name in "ab" for operation in ("park", "wake")}
    assert series(found, metrics.ESCALATIONS) == operations
    assert series(found, metrics.MAX_WAIT) == {(): 45.0}
    assert series(found, metrics.IMAGES_BUDGET) == ({} if budget is None else {(): budget})
    assert any(name.startswith("llmux_supervisor_process_") for name in found)


@in_loop
async def test_images_that_were_damaged_are_counted_by_model() -> None:
    telemetry = telemetry_on(World())
    telemetry.published(state_of(Config()), state_of(Config(), ModelRecord(A), ModelRecord(B)))
    for name in "aba":
        telemetry.quarantined(name)
    found = await telemetry.snapshot()
    assert series(found, metrics.QUARANTINED) == {("a",): 2, ("b",): 1}


SWITCH = SwitchFinished("a", ("b", "c"), False, 100.0, 101.0, 104.0, 110.0)


@pytest.mark.parametrize(
    ("switch", "from_", "kind", "phases"),
    [
        (SWITCH, ["b", "c"], "wake", {"drain": 1.0, "sleep": 3.0, "wake": 6.0}),
        (replace(SWITCH, victims=(), cold=True), [""], "cold",
         {"drain": 1.0, "sleep": 3.0, "start": 6.0}),
        (replace(SWITCH, drained_at=99.0), ["b", "c"], "wake",
         {"drain": 0.0, "sleep": 5.0, "wake": 6.0}),
    ],
)  # fmt: skip
@in_loop
async def test_a_switch_is_counted_of_each_who_made_room_and_measured_by_phase(
    switch: SwitchFinished, from_: list[str], kind: str, phases: dict[str, float]
) -> None:
    telemetry = telemetry_on(World())
    for times in (1, 2):
        telemetry.switched(switch)
        found = await telemetry.snapshot()
        assert series(found, metrics.SWITCHES) == {(one, "a", "ok"): times for one in from_}
        assert series(found, metrics.SWITCH_SECONDS) == {("a", kind): (times, 10.0 * times)}
        assert series(found, metrics.SWITCH_PHASE) == {
            (phase, "a"): (times, seconds * times) for phase, seconds in phases.items()
        }


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("gpus", [(), (80 * GIB, 40 * GIB)])
@in_loop
async def test_what_is_here_is_measured(published: bool, images: bool, gpus: tuple[int]) -> None:
    world = World(gpus)
    world.foreign = {7: (0, 5), 8: (0, 3), 9: (1, 2)} if gpus else {}
    world.images = {name: image_of(name, size) for name, size in (("a", 11), ("old", 22))}
    telemetry = telemetry_on(world, images=images, ours=frozenset({7, 9}))
    if published:
        telemetry.published(state_of(Config()), state_of(Config(), ModelRecord(A)))
    found = await telemetry.snapshot()
    here = {("a",): 11} | ({} if published else {("old",): 22})
    assert series(found, metrics.IMAGE_BYTES) == (here if images else {})
    assert series(found, metrics.GPU_OBSERVED) == {(): 1 if gpus else 0}
    totals, used, engines = {("0",): 80 * GIB, ("1",): 40 * GIB}, {("0",): 8, ("1",): 2}, 5
    assert series(found, metrics.GPU_TOTAL) == (totals if gpus else {})
    assert series(found, metrics.GPU_USED) == (used if gpus else {})
    assert series(found, metrics.GPU_ENGINES) == ({("0",): engines, ("1",): 2} if gpus else {})


@in_virtual_time
async def test_a_driver_that_hangs_costs_no_other_number() -> None:
    world = World()
    world.hold("gpu.look")
    found = await telemetry_on(world).snapshot()
    assert series(found, metrics.GPU_OBSERVED) == {(): 0}
    assert series(found, metrics.BUILD_INFO) == {("1.2",): 1}


@in_loop
async def test_what_a_worker_counted_outlives_it_and_what_it_had_does_not() -> None:
    store = Store()
    store.add(metrics.REQUESTS, "a", "200", amount=2)
    store.observe(metrics.REQUEST_SECONDS, "a", seconds=0.5)
    store.set(metrics.IN_FLIGHT, "a", value=4)
    numbers, telemetry, watchers = store.snapshot(), telemetry_on(World()), Watchers()

    def ask(worker: str, number: int) -> None:
        watchers.collected(worker, Collected(number, numbers))

    async def heard(*workers: str) -> list[dict[tuple[str, ...], Any]]:
        args = {"worker": "w", "snapshot": {}}
        found = (await telemetry.answer(args, watchers, list(workers), ask))["workers"]
        names = metrics.REQUESTS, metrics.REQUEST_SECONDS, metrics.IN_FLIGHT
        return [series(found, name) for name in names]

    one = [{("a", "200"): 2}, {("a",): (1, 0.5)}, {("a",): 4}]
    assert await heard("v", "w") == one
    assert await heard("w") == [*one[:2], {}], "nothing is in flight at one that has left"
    assert await heard("x", "w") == [{("a", "200"): 4}, {("a",): (2, 1.0)}, {("a",): 4}]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LlmuxError("it is lost"), OSError(5, "Input/output error")])
@pytest.mark.parametrize(
    ("look", "nth"), [("gpu.look", 1), ("gpu.look", 2), ("units.memory_bytes", 1)]
)
@in_loop
async def test_what_cannot_be_looked_at_leaves_the_rest_to_be_seen(
    look: str, nth: int, error: Exception
) -> None:
    world = World()
    shop = Shop(world, "/run")
    for config in (A, B):
        await shop.run(config, start_plan(config, 60.0))
    used = {name: engine.on_gpu for name, engine in world.engines.items()}
    holdings = Holdings(shop.drivers, shop.executor.instances)
    world.fail(look, error, nth=nth)
    seen = await holdings.now()
    blind = (look, nth) == ("gpu.look", 1)
    whole = {name: Held(None if blind else used[name], GIB) for name in "ab"}
    if look == "units.memory_bytes":
        del whole["a"]
    assert seen == whole
    ours = sum(used[name] for name in whole)
    gpus = (Gpu(0, 80 * GIB, sum(used.values()), ours),)
    assert holdings.gpus == (() if look == "gpu.look" else gpus)


# ---- warm-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "warms"),
    [
        (ModelRecord(A, Stopped()), True),
        (ModelRecord(A, Stopped(), image=OFFLOAD), False),
        (ModelRecord(replace(A, eviction=STOP), Stopped()), False),
        (ModelRecord(A, Stopped(), eviction_override=STOP), False),
        (ModelRecord(A, Serving("e", 0.0)), False),
        (ModelRecord(A, Parked(OFFLOAD, 0.0)), False),
        (ModelRecord(A, Failed(0.0, 1.0, "x")), False),
    ],
)
def test_only_what_is_down_and_would_be_kept_is_warmed(record: ModelRecord, warms: bool) -> None:
    assert to_warm(state_of(Config(), record)) == (["a"] if warms else [])
