"""Signs of life: a busy engine is not taken for a hung one, and a hung one is found in its time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from runtime_harness import Shop, in_virtual_time, model

from llmux.core.effects import Probe
from llmux.core.events import ProbeFinished
from llmux.core.plans import start_plan
from llmux.drivers.engine.counters import work_counters
from llmux.engines.vllm import VLLM
from llmux.errors import DriverTimeout, EngineUnhealthy
from llmux.ports import Vitals
from llmux.protocol import Address
from llmux.runtime.engines.vitals import Watch
from llmux.runtime.host import Drivers
from tests.twins.world import World

MODEL = model("a", stall_timeout_secs=120.0)
SILENT = DriverTimeout("look at", "a", "no answer")
WORKS = Vitals(200, running=4, progress=1000.0)


async def probe(
    world: World, tmp_path: Path, *, stalled: bool = True, times: int = 1
) -> ProbeFinished:
    """The answer to the last of ``times`` probes of 60 s."""
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    ended = ProbeFinished("a", "t.1", None)
    for _ in range(times):
        shop.executor.probe(Probe("a", "t.1", MODEL, 60.0, stalled))
        event = await shop.posted.get()
        assert isinstance(event, ProbeFinished)
        assert event.stalled is stalled
        ended = event
        if ended.error is not None:
            break
    return ended


@pytest.mark.parametrize("stalled", [True, False])
@in_virtual_time
async def test_an_engine_that_is_stopped_hangs(tmp_path: Path, stalled: bool) -> None:
    world = World()
    world.fail("engine.vitals", SILENT, always=True)
    ended = await probe(world, tmp_path, stalled=stalled)
    assert ended.error is not None
    assert "no answer and no computing for 60 s" in ended.error


class Stopped:
    """Takes questions and answers none, as a process after SIGSTOP."""

    async def vitals(self, address: Address, timeout: float) -> Vitals:
        await asyncio.sleep(timeout)
        return Vitals(None)


@pytest.mark.parametrize(("seconds", "takes"), [(6.0, 6.0), (3.0, 4.0), (0.5, 1.0)])
@in_virtual_time
async def test_the_watch_ends_in_its_time_although_each_question_takes_its_own(
    seconds: float, takes: float
) -> None:
    """What moves is seen by a second question, also where the first took all of the time."""
    drivers = cast("Drivers", SimpleNamespace(engine=Stopped(), units=None))
    watch = Watch(drivers, "a", Address(port=1), None, stalled=True, progress=None)
    began = asyncio.get_running_loop().time()
    with pytest.raises(EngineUnhealthy, match=f"no answer and no computing for {seconds:g} s"):
        await watch.run(seconds)
    assert asyncio.get_running_loop().time() - began == pytest.approx(takes, abs=0.06)


@in_virtual_time
async def test_an_engine_that_computes_lives_without_an_answer(tmp_path: Path) -> None:
    world = World()
    world.fail("engine.vitals", SILENT, always=True)
    world.cpu_per_look["a"] = 10.0
    assert (await probe(world, tmp_path)).error is None


@pytest.mark.parametrize("status", [200, 404])
@in_virtual_time
async def test_any_answer_is_a_sign_of_life_of_an_engine_without_counters(
    tmp_path: Path, status: int
) -> None:
    world = World()
    world.vitals["a"] = Vitals(status)
    assert (await probe(world, tmp_path)).error is None


@in_virtual_time
async def test_counters_that_move_are_a_sign_of_life(tmp_path: Path) -> None:
    world = World()
    world.vitals["a"] = WORKS
    world.progress_per_look["a"] = 1.0
    assert (await probe(world, tmp_path, times=50)).error is None


@in_virtual_time
async def test_an_engine_that_says_it_has_no_request_must_answer_one(tmp_path: Path) -> None:
    world = World()
    world.vitals["a"] = Vitals(200, running=0, progress=1000.0)
    assert (await probe(world, tmp_path)).error is None
    lacks = EngineUnhealthy("test", "a", "/v1/completions answered 404", status=404)
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    reset = EngineUnhealthy("test", "a", "the connection was reset")
    for error, lives in ((lacks, True), (SILENT, False), (reset, False)):
        world.fail("engine.canary", error, always=True)
        shop.executor.probe(Probe("a", "t.1", MODEL, 60.0, stalled=True))
        event = await shop.posted.get()
        assert isinstance(event, ProbeFinished)
        assert (event.error is None) is lives
        world._faults.clear()


@in_virtual_time
async def test_counters_that_stand_still_while_nothing_computes_are_a_hang(
    tmp_path: Path,
) -> None:
    world = World()
    world.vitals["a"] = WORKS
    world.cpu_per_look["a"] = 0.01  # of answering the question
    ended = await probe(world, tmp_path)
    assert ended.error is not None
    assert "its counters stand still and it does not compute, for 60 s" in ended.error


@in_virtual_time
async def test_a_step_of_minutes_is_no_hang_and_one_without_end_is(tmp_path: Path) -> None:
    """A compilation, a long prefill: nothing is counted, and the processes compute."""
    world = World()
    world.vitals["a"] = WORKS
    world.cpu_per_look["a"] = 10.0
    assert (await probe(world, tmp_path)).error is None
    assert (await probe(world, tmp_path, times=5000)).error is not None


@in_virtual_time
async def test_an_engine_whose_health_says_no_is_given_time_and_then_replaced(
    tmp_path: Path,
) -> None:
    world = World()
    world.vitals["a"] = Vitals(503)
    ended = await probe(world, tmp_path, stalled=False)
    assert ended.error is not None
    assert "/health says 503" in ended.error


@pytest.mark.parametrize("status", [None, 200, 500])
@pytest.mark.parametrize("stalled", [True, False])
@in_virtual_time
async def test_counters_that_move_outweigh_whatever_health_says(
    tmp_path: Path, status: int | None, stalled: bool
) -> None:
    """Before, an engine at work was killed for a /health that hung, was garbage or said 500."""
    world = World()
    world.vitals["a"] = Vitals(status, running=1, progress=1000.0)
    world.progress_per_look["a"] = 5.0
    assert (await probe(world, tmp_path, stalled=stalled, times=3)).error is None


@in_virtual_time
async def test_an_engine_that_says_500_and_computes_has_the_time_of_a_long_step(
    tmp_path: Path,
) -> None:
    world = World()
    world.vitals["a"] = Vitals(500)
    world.cpu_per_look["a"] = 10.0
    assert (await probe(world, tmp_path, times=3)).error is None
    ended = await probe(world, tmp_path, times=5000)
    assert ended.error is not None and "/health says 500 for 60 s" in ended.error


@pytest.mark.parametrize(
    ("running", "progress"), [(1, 1000.0), (0, 1000.0), (None, None)], ids=["busy", "idle", "mute"]
)
@in_virtual_time
async def test_an_api_server_whose_engine_core_is_dead_is_replaced(
    tmp_path: Path, running: int | None, progress: float | None
) -> None:
    """vLLM's answers 503 on /health and 500 on everything else, and its counters stand still."""
    world = World()
    world.vitals["a"] = Vitals(503, running, progress)
    world.cpu_per_look["a"] = 0.01
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, start_plan(MODEL, 60.0))
    dead = EngineUnhealthy("test", "a", "/v1/completions answered 500", status=500)
    world.fail("engine.canary", dead, always=True)
    for stalled in (True, False):
        shop.executor.probe(Probe("a", "t.1", MODEL, 60.0, stalled))
        event = await shop.posted.get()
        assert isinstance(event, ProbeFinished)
        assert event.error is not None and "/health says 503 for 60 s" in event.error


@pytest.mark.parametrize(("call", "nth"), [("units.cpu_seconds", 1), ("engine.canary", 2)])
@in_virtual_time
async def test_whatever_a_look_raises_is_no_sign_of_life(
    tmp_path: Path, call: str, nth: int
) -> None:
    world = World()
    world.vitals["a"] = Vitals(200, running=0, progress=1000.0)
    world.fail(call, RuntimeError("can't start new thread"), nth=nth)
    ended = await probe(world, tmp_path)
    assert ended.error == "can't start new thread"


def test_vllm_s_counters_are_read_and_others_are_none() -> None:
    text = b"""# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:generation_tokens_total{engine="0"} 10.0
vllm:generation_tokens_total{engine="1"} 5.0
vllm:prompt_tokens_total{engine="0"} 7.0
vllm:iteration_tokens_total_count{engine="0"} 4.0
vllm:iteration_tokens_total_bucket{engine="0",le="1"} 99.0
"""
    assert work_counters(text, VLLM) == (5, 19.0)
    assert work_counters(b"{}", VLLM) == (None, None)
    odd = b"vllm:num_requests_running x\nvllm:generation_tokens_total NaN"
    assert work_counters(odd, VLLM) == (None, None)


@in_virtual_time
async def test_a_look_that_never_ends_is_no_sign_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    world.hold("engine.vitals")
    ended = await probe(world, tmp_path)
    assert ended.error == "no sign of life within 60 s"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
