"""Operations on the twins: what each step does, and how it ends when a step fails, hangs or the
engine dies under it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from runtime_harness import (
    DISCARD,
    OFFLOAD,
    OFFLOAD_FREEZE,
    STOP,
    Shop,
    in_loop,
    in_virtual_time,
    model,
)

from llmux.config.schema import Eviction, Process, Weights
from llmux.core.events import EngineExited
from llmux.core.plans import Outcome, Plan, park_plan, start_plan, stop_plan, wake_plan
from llmux.protocol import Address
from llmux.runtime.engines.facts import COLD_SECS
from tests.twins.engine import MemoryEngine
from tests.twins.world import GIB, World

MODEL = model("a", eviction=OFFLOAD_FREEZE)
START = start_plan(MODEL, 60.0)
STOPPING = stop_plan(MODEL)
RETAIN_FREEZE = Eviction(Weights.RETAIN, Process.FREEZE)

# (the twin's operation, the eviction it is parked by before, the plan in which it is a step)
STEPS: list[tuple[str, Eviction | None, Plan]] = [
    ("units.start", None, START),
    ("engine.wait_healthy", None, START),
    ("engine.canary", None, START),
    ("engine.sleep", None, park_plan(MODEL, OFFLOAD)),
    ("freezer.freeze", None, park_plan(MODEL, OFFLOAD_FREEZE)),
    ("freezer.thaw", OFFLOAD_FREEZE, wake_plan(MODEL, OFFLOAD_FREEZE)),
    ("engine.wake", OFFLOAD, wake_plan(MODEL, OFFLOAD)),
    ("engine.reload_weights", DISCARD, wake_plan(MODEL, DISCARD)),
    ("engine.wait_healthy", OFFLOAD, wake_plan(MODEL, OFFLOAD)),
    ("engine.canary", OFFLOAD, wake_plan(MODEL, OFFLOAD)),
]
NAMES = [f"{operation}-{plan.kind}-{plan.eviction}" for operation, _, plan in STEPS]
STARTED = [step for step in STEPS if step[0] != "units.start"]
STARTED_NAMES = [name for name in NAMES if not name.startswith("units.start")]


async def ready_for(plan: Plan, parked: Eviction | None, shop: Shop) -> None:
    """Bring the model to where ``plan`` begins."""
    if plan is START:
        return
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP
    if parked is not None:
        assert (await shop.run(MODEL, park_plan(MODEL, parked))).outcome is Outcome.PARKED


@pytest.fixture
def world() -> World:
    return World()


@in_loop
async def test_a_start_a_parking_and_a_wake_do_their_steps_in_order(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP
    assert [kind for kind, _ in shop.phases] == [step.kind for step in START.steps]
    assert world.used(0) == int(80 * GIB * 0.9)
    parking = park_plan(MODEL, OFFLOAD_FREEZE)
    assert (await shop.run(MODEL, parking)).outcome is Outcome.PARKED
    assert world.used(0) == GIB
    waking = wake_plan(MODEL, OFFLOAD_FREEZE)
    assert (await shop.run(MODEL, waking)).outcome is Outcome.UP
    assert [kind for kind, _ in shop.phases] == [step.kind for step in waking.steps]
    assert (await shop.run(MODEL, STOPPING)).outcome is Outcome.DOWN
    assert world.engines == {}
    assert world.violations == []


@pytest.mark.parametrize("eviction", [OFFLOAD, DISCARD, OFFLOAD_FREEZE, RETAIN_FREEZE], ids=str)
@in_loop
async def test_every_way_of_parking_has_a_way_back(
    world: World, tmp_path: Path, eviction: Eviction
) -> None:
    shop = Shop(world, str(tmp_path))
    await ready_for(wake_plan(MODEL, eviction), eviction, shop)
    assert (await shop.run(MODEL, wake_plan(MODEL, eviction))).outcome is Outcome.UP
    assert world.violations == []


@pytest.mark.parametrize(("operation", "parked", "plan"), STEPS, ids=NAMES)
@in_loop
async def test_a_step_that_fails_ends_the_operation_with_the_engine_down(
    world: World, tmp_path: Path, operation: str, parked: Eviction | None, plan: Plan
) -> None:
    shop = Shop(world, str(tmp_path))
    await ready_for(plan, parked, shop)
    world.fail(operation)
    ended = await shop.run(MODEL, plan)
    assert ended.outcome is Outcome.DOWN
    assert "a fault was ordered" in ended.detail
    assert world.engines == {}
    assert world.used(0) == 0
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP  # it can be started again


@pytest.mark.parametrize(("operation", "parked", "plan"), STEPS, ids=NAMES)
@in_virtual_time
async def test_a_step_that_hangs_ends_by_its_deadline_with_the_engine_down(
    world: World, tmp_path: Path, operation: str, parked: Eviction | None, plan: Plan
) -> None:
    shop = Shop(world, str(tmp_path))
    await ready_for(plan, parked, shop)
    world.hold(operation)  # the driver itself forgets its deadline
    ended = await shop.run(MODEL, plan)
    assert ended.outcome is Outcome.DOWN
    assert "outcome unknown" in ended.detail
    assert world.engines == {}


@pytest.mark.parametrize(("operation", "parked", "plan"), STARTED, ids=STARTED_NAMES)
@in_loop
async def test_the_death_of_the_engine_ends_the_step_it_happens_in(
    world: World, tmp_path: Path, operation: str, parked: Eviction | None, plan: Plan
) -> None:
    shop = Shop(world, str(tmp_path))
    await ready_for(plan, parked, shop)
    hold = world.hold(operation)
    shop.begin(MODEL, plan)
    await hold.reached.wait()
    world.output["a"] = ["no such tensor"]
    world.exit("a", "killed by SIGSEGV")
    ended = await shop.ended()  # the hold is never released
    assert ended.outcome is Outcome.DOWN
    assert "it died: killed by SIGSEGV; its last lines:\nno such tensor" in ended.detail


@in_loop
async def test_a_death_is_told_by_its_root_cause_in_one_line(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    hold = world.hold("engine.wait_healthy")
    shop.begin(MODEL, START)
    await hold.reached.wait()
    frames = ["Traceback (most recent call last):", '  File "/x.py", line 1, in y']
    cause = "ValueError: No available memory for the cache blocks."
    failed = "RuntimeError: Engine core initialization failed. See root cause above."
    world.output["a"] = [*frames, cause, *frames * 20, failed]
    world.exit("a", "exit status 1")
    ended = await shop.ended()
    assert f"it died: exit status 1: {cause} (see `llmux logs a`)" in ended.detail
    assert "\n" not in ended.detail


@in_loop
async def test_a_death_with_a_full_disk_under_its_output_names_the_disk(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    hold = world.hold("engine.wait_healthy")
    shop.begin(MODEL, START)
    await hold.reached.wait()
    world.output["no room"] = ["the disk of /images is full"]
    world.exit("a", "exit status 1")
    ended = await shop.ended()
    assert "it died: exit status 1, perhaps of its own output: the disk of /images" in ended.detail


@in_loop
async def test_an_optional_step_that_fails_is_passed_over(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    world.fail("engine.describe")
    assert (await shop.run(MODEL, START)).outcome is Outcome.UP
    assert ("describe", "failed") in shop.phases


@in_loop
async def test_an_engine_that_does_not_listen_is_killed(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("units.terminate")
    assert (await shop.run(MODEL, park_plan(MODEL, STOP))).outcome is Outcome.DOWN
    assert world.engines == {}


class Reluctant(MemoryEngine):
    """Whose sleep, once cancelled, takes a while to end."""

    async def sleep(self, address: Address, level: int, deadline: float) -> None:
        try:
            await super().sleep(address, level, deadline)
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self._world.record("sleep is over", "a")


@in_loop
async def test_a_step_whose_engine_died_has_ended_before_the_next_begins(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path), engine=Reluctant(world))
    await shop.run(MODEL, START)
    asleep = world.hold("engine.sleep")
    shop.begin(MODEL, park_plan(MODEL, OFFLOAD))
    await asleep.reached.wait()
    world.exit("a")
    assert (await shop.ended()).outcome is Outcome.DOWN
    assert world.names("sleep is over", "units.kill") == ["sleep is over a", "units.kill a"]


@in_virtual_time
async def test_an_operation_that_is_given_up_is_ended_first(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path), engine=Reluctant(world))
    await shop.run(MODEL, START)
    asleep = world.hold("engine.sleep")
    shop.begin(MODEL, park_plan(MODEL, OFFLOAD))
    await asleep.reached.wait()
    assert (await shop.run(MODEL, stop_plan(MODEL, grace=False))).outcome is Outcome.DOWN
    assert world.names("sleep is over", "units.kill") == ["sleep is over a", "units.kill a"]


@in_loop
async def test_an_engine_that_dies_behind_its_last_step_is_known_to_have_died(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    looked = world.hold("units.stranger", nth=3)  # before the spawn, when it is healthy, at the end
    shop.begin(MODEL, START)
    await looked.reached.wait()
    world.exit("a", "killed by SIGSEGV")
    await asyncio.sleep(0)
    looked.release()
    assert (await shop.ended()).outcome is Outcome.UP
    died = await shop.posted.get()
    assert isinstance(died, EngineExited) and "SIGSEGV" in died.description


@pytest.mark.parametrize("plan", [park_plan(MODEL, OFFLOAD), STOPPING], ids=lambda p: p.kind)
@in_loop
async def test_an_engine_that_cannot_even_be_killed_is_reported_stuck(
    world: World, tmp_path: Path, plan: Plan
) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("engine.sleep")
    world.fail("units.kill", always=True)
    ended = await shop.run(MODEL, plan)
    assert ended.outcome is Outcome.STUCK
    assert "; then " in ended.detail
    assert shop.executor.notes("a")["pid"]  # a later attempt knows whom to kill


@in_loop
async def test_a_kill_that_fails_once_is_tried_again(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.fail("units.kill")
    assert (await shop.run(MODEL, STOPPING)).outcome is Outcome.DOWN
    assert world.engines == {}


@in_loop
async def test_wrong_answers_after_a_wake_are_not_served(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    await ready_for(wake_plan(MODEL, OFFLOAD), OFFLOAD, shop)
    world.engines["a"].spoiled = True
    ended = await shop.run(MODEL, wake_plan(MODEL, OFFLOAD))
    assert ended.outcome is Outcome.DOWN
    assert "its canary answered '!!!!!!!!' instead of 'a says Paris'" in ended.detail


@in_loop
async def test_a_death_between_operations_is_an_event_of_its_own(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.exit("a", "killed by SIGKILL")
    assert await shop.posted.get() == EngineExited(
        "a", "killed by SIGKILL (out of memory? see `journalctl -k`)"
    )


@in_loop
async def test_a_program_that_ends_well_is_told_that_it_must_not(
    world: World, tmp_path: Path
) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    world.exit("a", "exit status 0")
    ended = await shop.posted.get()
    assert isinstance(ended, EngineExited)
    assert "must stay in the foreground" in ended.description


@in_loop
async def test_a_stop_that_was_asked_for_is_not_a_death(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    await shop.run(MODEL, STOPPING)
    assert shop.posted.empty()


@in_loop
async def test_closing_leaves_the_engines_as_they_are(world: World, tmp_path: Path) -> None:
    shop = Shop(world, str(tmp_path))
    await shop.run(MODEL, START)
    hold = world.hold("engine.sleep")
    shop.begin(MODEL, park_plan(MODEL, OFFLOAD))
    await hold.reached.wait()
    await shop.executor.close()
    assert list(world.engines) == ["a"]
    assert shop.posted.empty()


@in_loop
async def test_what_a_cold_start_took_is_kept_through_parking_and_waking(tmp_path: Path) -> None:
    shop = Shop(World(), str(tmp_path))
    instance = shop.executor.instance(MODEL)
    assert instance.facts.cold_seconds == COLD_SECS
    await shop.run(MODEL, START)
    took = instance.facts.cold_seconds
    assert took != COLD_SECS
    await shop.run(MODEL, park_plan(MODEL, OFFLOAD))
    await shop.run(MODEL, wake_plan(MODEL, OFFLOAD))
    assert instance.facts.cold_seconds == took
