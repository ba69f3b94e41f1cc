"""Memory that is looked at, moves that are counted, and each refusal of an argument."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import Any, cast

import pytest
from desks import desk
from runtime_harness import (
    DISCARD,
    OFFLOAD,
    STOP,
    Shop,
    drivers_on,
    in_loop,
    in_virtual_time,
    model,
)

from llmux import metrics
from llmux.config.schema import Config, Eviction, Process, Weights
from llmux.core.plans import start_plan
from llmux.core.records import (
    Failed,
    ModelRecord,
    Parked,
    Parking,
    Phase,
    Serving,
    Starting,
    State,
    Stopped,
    Stopping,
    Waking,
)
from llmux.errors import LlmuxError, Reason
from llmux.image_ports import Checkpointer
from llmux.metrics import METRICS, REQUESTS, Store
from llmux.ports import GpuObserver
from llmux.protocol import Collected
from llmux.runtime.control import arguments
from llmux.runtime.control import holdings as holdings_module
from llmux.runtime.control import telemetry as module
from llmux.runtime.control.holdings import FRESH_SECS, LOOK_SECS, Gpu, Held, Holdings
from llmux.runtime.control.telemetry import Telemetry
from llmux.runtime.control.watchers import Watchers
from tests.twins.gpu import MemoryGpu
from tests.twins.world import GIB, World

A = model("a", gpu_memory=0.9)
SUSPEND = Eviction(Weights.RETAIN, Process.CUDA_SUSPEND)


# ---- memory --------------------------------------------------------------------------------------


class Counted(MemoryGpu):
    looks = 0
    sees = True
    error: Exception | None = None

    async def totals(self) -> Any:
        if self.error is not None:
            raise self.error
        return await super().totals()

    @property
    def available(self) -> bool:
        return self.sees

    async def processes(self) -> Any:
        self.looks += 1
        return await super().processes()


@in_virtual_time
async def test_memory_is_looked_at_once_for_all_who_ask_within_a_second() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        now = [100.0]
        monkeypatch.setattr(holdings_module, "monotonic", lambda: now[0])
        world = World((80 * GIB, 40 * GIB))
        world.foreign[7] = (1, 5)
        shop = Shop(world, "/run", gpu=Counted(world))
        gpu = cast(Counted, shop.drivers.gpu)
        await shop.run(A, start_plan(A, 60.0))
        holdings = Holdings(shop.drivers, shop.executor.instances)
        gpu.looks, held = 0, world.used(0)
        assert [await holdings.now() for _ in range(2)] == [{"a": Held(held, GIB)}] * 2
        assert gpu.looks == 1
        assert holdings.gpus == (Gpu(0, 80 * GIB, held, held), Gpu(1, 40 * GIB, 5, 0))
        now[0] += FRESH_SECS
        await holdings.now()
        assert gpu.looks == 2
        now[0] += FRESH_SECS
        hold = world.hold("units.memory_bytes")
        loop = asyncio.get_running_loop()
        began = loop.time()
        both = await asyncio.gather(holdings.now(), holdings.now())
        assert list(both) == [{"a": Held(held, GIB)}] * 2
        assert gpu.looks == 3
        assert loop.time() - began >= LOOK_SECS
        await holdings.now()
        assert gpu.looks == 3, "the one that hangs goes on by itself"
        hold.release()
        await holdings.now()
        now[0] += FRESH_SECS
        for error in (LlmuxError("NVML is lost"), OSError(5, "Input/output error")):
            gpu.error = error
            assert await holdings.now() == {"a": Held(held, GIB)}
            gpus: Any = holdings.gpus
            assert gpus == ()
            now[0] += FRESH_SECS
        gpu.error = None
        gpu.sees = False
        now[0] += FRESH_SECS
        assert await holdings.now() == {"a": Held(None, GIB)}
        assert len(holdings.gpus) == 0


# ---- metrics -------------------------------------------------------------------------------------


def telemetry_on(world: World, **parts: Any) -> Telemetry:
    drivers = drivers_on(world, "/run")

    async def engines() -> set[int]:
        return {7}

    gpu, images = parts.get("gpu", drivers.gpu), parts.get("images", drivers.checkpointer)
    return Telemetry("1.2", cast(GpuObserver, gpu), cast(Checkpointer, images), engines)


def state_of(phase: Phase) -> State:
    return State(Config(), 1, "e", models=MappingProxyType({"a": ModelRecord(A, phase)}))


PARKING = Parking(1, 0.0, OFFLOAD)


@pytest.mark.parametrize(
    ("before", "after", "counted"),
    [
        (Starting(1, 0.0), Failed(0.0, 1.0, "x"), {"SWITCHES": ["", "a", "failed"]}),
        (Waking(1, 0.0, OFFLOAD), Failed(0.0, 1.0, "x"), {"SWITCHES": ["", "a", "failed"]}),
        (Starting(1, 0.0), Serving("e", 0.0), {}),
        (Waking(1, 0.0, OFFLOAD), Starting(2, 0.0), {"ESCALATIONS": ["a", "wake"]}),
        (Waking(1, 0.0, OFFLOAD), Stopped(), {}),
        (Stopped(), Starting(1, 0.0), {}),
        (PARKING, Failed(0.0, 1.0, "x"), {"PARK_FAILURES": ["a", "stuck"]}),
        (PARKING, Stopped(), {"PARK_FAILURES": ["a", "stopped"], "ESCALATIONS": ["a", "park"]}),
        (Parking(1, 0.0, STOP), Stopped(), {}),
        (PARKING, Parked(OFFLOAD, 0.0), {}),
        (Serving("e", 0.0), Stopping(1, 0.0, "x", 0.9, crashed=True), {"ENGINE_DEATHS": ["a"]}),
        (Serving("e", 0.0), Stopping(1, 0.0, "x", 0.9), {}),
        (Stopping(1, 0.0, "x", 0.9), Failed(0.0, 1.0, "x"), {}),
    ],
    ids=lambda one: one.state.value if not isinstance(one, dict) else "",
)
def test_only_what_went_wrong_is_counted_of_moves(
    before: Phase, after: Phase, counted: dict[str, list[str]]
) -> None:
    telemetry = telemetry_on(World())
    telemetry.published(state_of(before), state_of(after))
    names = {getattr(module, name): [[labels, 1]] for name, labels in counted.items()}
    assert telemetry._store.snapshot() == names
    telemetry.published(state_of(after), state_of(after))
    assert telemetry._store.snapshot() == names
    assert set(names) <= set(METRICS)


@pytest.mark.parametrize("error", [LlmuxError("x"), OSError(5, "x"), TimeoutError(), None])
@in_loop
async def test_what_cannot_be_measured_costs_no_other_number(error: Exception | None) -> None:
    world = World()
    world.foreign = {7: (0, 5), 8: (0, 3)}
    if error is not None:
        world.fail("gpu.look", error)
    telemetry = telemetry_on(world)
    telemetry.published(state_of(Stopped()), state_of(Stopped()))
    found = await telemetry.snapshot()
    assert found[metrics.BUILD_INFO] == [[["1.2"], 1]]
    assert found[metrics.GPU_OBSERVED] == [[[], 0 if error else 1]]
    seen = {name: found.get(name) for name in (metrics.GPU_USED, metrics.GPU_ENGINES)}
    if error is None:
        assert seen == {metrics.GPU_USED: [[["0"], 8]], metrics.GPU_ENGINES: [[["0"], 5]]}
    else:
        assert set(seen.values()) == {None}


@in_loop
async def test_numbers_of_workers_that_left_are_kept_and_the_others_are_asked() -> None:
    def numbers(count: int) -> dict[str, Any]:
        store = Store()
        store.add(REQUESTS, "a", "200", amount=count)
        return store.snapshot()

    telemetry, watchers, asked = telemetry_on(World()), Watchers(), list[str]()

    def ask(worker: str, number: int) -> None:
        asked.append(worker)
        watchers.collected(worker, Collected(number, numbers(5)))

    async def sum_of(workers: list[str], **args: Any) -> Any:
        return (await telemetry.answer(args, watchers, workers, ask))["workers"].get(REQUESTS)

    of = [["a", "200"]]
    assert await sum_of(["v", "w"], worker="w", snapshot=numbers(2)) == [[*of, 5]]
    assert asked == ["v"]
    assert await sum_of(["w"], worker="w", snapshot=numbers(3)) == [[*of, 5]], "v has left"
    assert await sum_of(["x"], worker="x") == [[*of, 8]], "and w"
    assert await sum_of([], worker="x", snapshot="no") == [[*of, 8]]


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "args", "text"),
    [
        ("load", {}, 'cannot act: "model" is missing or not a string'),
        ("load", {"model": ["a"]}, 'cannot act: "model" is missing or not a string'),
        ("load", {"model": "x"}, "Model not found: x"),
        ("sleep", {"model": "a", "eviction": "x+y"}, "cannot read the eviction: "),
        ("sleep", {"model": "a", "eviction": str(SUSPEND)},
         f"cannot park a by {SUSPEND}: there is no CUDA driver here (llmux doctor)"),
        ("eviction_set", {"model": "a"}, 'cannot set the eviction: "eviction" is missing'),
        ("cancel", {"orders": [True, None]}, 'cannot cancel: "orders" must be a list of numbers'),
        ("unpin", {"models": "a"}, 'cannot unpin: "models" must be a list of names'),
        ("reload", {"dry_run": 1}, '"dry_run" must be true or false, not 1'),
        ("logs", {"model": "a", "previous": "x"}, '"previous" must be true or false'),
        ("validate", {"model": "a"}, 'cannot validate: "policies" is missing or empty'),
        ("validate", {"model": "a", "policies": []}, 'cannot validate: "policies" is missing'),
        ("validate", {"model": "a", "policies": "stop"}, 'cannot validate: "policies" is missing'),
        ("validate", {"model": "a", "policies": [str(SUSPEND)]}, "there is no CUDA driver here"),
        ("restart", {"models": "a"}, 'cannot restart: "models" must be a list of names'),
    ],
)  # fmt: skip
@in_loop
async def test_each_argument_that_cannot_be_meant_is_named(
    verb: str, args: dict[str, Any], text: str
) -> None:
    async with desk(cuda=None) as d:
        refused = await d.refusal(verb, **args)
        assert text in str(refused)
        wanted = Reason.UNKNOWN_MODEL if "not found" in text else Reason.BAD_REQUEST
        assert refused.reason is wanted


@in_loop
async def test_a_dry_run_is_passed_on_and_what_needs_no_driver_is_allowed() -> None:
    async with desk(cuda=None) as d:
        assert await d.ask("reload", dry_run=True) == {"dry_run": True}
        assert await d.ask("reload", dry_run=False) == {}
        await d.ask("eviction_set", model="a", eviction=str(DISCARD))
    async with desk() as d:
        await d.ask("eviction_set", model="a", eviction=str(SUSPEND))
        await d.life.settled()
        assert d.life.loop.state.models["a"].eviction == SUSPEND


def test_a_fault_of_ours_in_an_eviction_is_not_a_bad_request() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        def broken(_: str) -> Eviction:
            raise RuntimeError("a fault")

        monkeypatch.setattr(Eviction, "parse", broken)
        with pytest.raises(RuntimeError):
            arguments.Arguments(cast(Any, None), cast(Any, None)).eviction({"eviction": "x"})
