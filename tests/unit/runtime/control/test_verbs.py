"""The operators' verbs on the whole supervisor, and the words in which it speaks of itself."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from runtime_harness import DISCARD, STOP, Life, begin_life, config_of, in_loop, model

from llmux.config.schema import Config
from llmux.core.events import ConfigChanged
from llmux.core.records import Failed, ModelRecord, Parked, Serving, Stopped
from llmux.errors import Reason, Refused
from llmux.protocol import MAX_LINE, Ask
from llmux.runtime.control import checkpoints
from llmux.runtime.control.status import catalog, one_line
from llmux.runtime.control.verbs import Verbs
from llmux.runtime.control.warmup import to_warm, warm_up
from tests.twins.disk import MemoryStore
from tests.twins.world import World


class Desk:
    def __init__(self, life: Life, world: World) -> None:
        self.life, self.world = life, world
        self.reloads = 0
        self.verbs = Verbs(life.loop, life.executor, life.images, life.drivers, self._reload)

    async def _reload(self) -> dict[str, Any]:
        self.reloads += 1
        return {"message": "configuration reloaded"}

    async def ask(self, verb: str, **args: Any) -> Any:
        return await self.verbs.answer(Ask(1, verb, args))

    async def refusal(self, verb: str, **args: Any) -> Refused:
        with pytest.raises(Refused) as caught:
            await self.ask(verb, **args)
        return caught.value

    async def model(self, name: str) -> dict[str, Any]:
        found = (await self.ask("status"))["models"][name]
        assert isinstance(found, dict)
        return found


@asynccontextmanager
async def desk(config: Config | None = None) -> AsyncIterator[Desk]:
    world = World()
    with tempfile.TemporaryDirectory() as runtime:
        config = config or config_of(model("a"), model("b"))
        life = await begin_life(config, world, runtime, MemoryStore())
        try:
            yield Desk(life, world)
        finally:
            await life.drop()


@in_loop
async def test_a_load_that_another_order_ended_says_so() -> None:
    async with desk() as d:
        d.world.hold("engine.wait_healthy")
        loading = asyncio.create_task(d.ask("load", model="a"))
        await d.life.until_state("a", "starting")
        await d.ask("unload", model="a")
        with pytest.raises(Refused, match=r"cannot load a: another order left it stop"):
            await loading


@in_loop
async def test_load_answers_when_the_model_serves_and_at_once_when_it_does_already() -> None:
    async with desk() as d:
        d.world.version = "0.17.3"
        assert await d.ask("load", model="a") == {"message": "Model a is serving"}
        now = await d.model("a")
        assert (now["state"], now["engine_version"]) == ("serving", "0.17.3")
        told = catalog(d.life.loop.state, d.life.executor, {}, 0.0).infos()
        assert {one.name: one.max_model_len for one in told} == {"a": 4096, "b": None}
        models = d.life.loop.state.models
        leaving = MappingProxyType({**models, "a": replace(models["a"], removed=True)})
        state = replace(d.life.loop.state, models=leaving)
        told = catalog(state, d.life.executor, {}, 0.0).infos()
        assert [one.name for one in told] == ["b"], "one that is leaving hides no other"
        calls = len(d.world.calls)
        await d.ask("wake", model="a")
        assert len(d.world.calls) == calls


@in_loop
async def test_an_order_is_answered_for_itself_whatever_else_is_going_on() -> None:
    async with desk() as d:
        for _ in range(20):
            d.life.demand("b")  # events ahead of it in the queue
        await d.ask("load", model="a")
        assert d.life.state_of("a") == "serving"
        for _ in range(20):
            d.life.demand("b")
        await d.ask("sleep", model="a")
        assert d.life.state_of("a") == "parked"
        for _ in range(20):
            d.life.demand("b")
        assert await d.ask("unload", model="a") == {"message": "Model a is stopped"}
        assert d.life.state_of("a") == "stopped"


@in_loop
async def test_two_who_ask_for_the_same_model_join_one_start() -> None:
    async with desk() as d:
        await asyncio.gather(d.ask("load", model="a"), d.ask("load", model="a"))
        assert d.world.names("units.start") == ["units.start a"]


@in_loop
async def test_a_load_that_fails_is_refused_with_the_cause() -> None:
    async with desk() as d:
        d.world.fail("engine.wait_healthy")
        refused = await d.refusal("load", model="a")
        assert refused.reason is Reason.START_FAILED
        assert "a fault was ordered" in str(refused)
        await d.ask("load", model="a")  # an operator does not wait for the back-off


@in_loop
async def test_a_switch_moves_the_pin_along() -> None:
    async with desk() as d:
        await d.ask("pin", model="a")
        assert (await d.ask("status"))["mode"] == {"mode": "manual", "pinned": "a"}
        await d.ask("switch", model="b")
        assert (await d.ask("status"))["mode"] == {"mode": "manual", "pinned": "b"}
        assert d.life.state_of("b") == "serving"
        await d.ask("unpin")
        await d.life.settled()
        assert (await d.ask("status"))["mode"] == {"mode": "auto"}


@in_loop
async def test_a_pin_that_cannot_be_kept_is_taken_back() -> None:
    async with desk() as d:
        d.world.fail("units.start")
        await d.refusal("pin", model="a")
        await d.life.settled()
        assert (await d.ask("status"))["mode"] == {"mode": "auto"}


@pytest.mark.parametrize(
    ("verb", "args", "reason"),
    [
        ("dance", {}, Reason.BAD_REQUEST),
        ("load", {}, Reason.BAD_REQUEST),
        ("load", {"model": 7}, Reason.BAD_REQUEST),
        ("load", {"model": "nobody"}, Reason.UNKNOWN_MODEL),
        ("sleep", {"model": "a", "eviction": "soundly"}, Reason.BAD_REQUEST),
        ("sleep", {"model": "a", "eviction": {"weights": "retain"}}, Reason.BAD_REQUEST),
        ("eviction_set", {"model": "a"}, Reason.BAD_REQUEST),
        ("mode", {"mode": "sport"}, Reason.BAD_REQUEST),
        ("logs", {"model": "a", "lines": 0}, Reason.BAD_REQUEST),
        ("logs", {"model": "a", "lines": "all"}, Reason.BAD_REQUEST),
        ("pin", {"models": ["a"], "seconds": 10**400}, Reason.BAD_REQUEST),
    ],
)
@in_loop
async def test_what_cannot_be_meant_is_refused(
    verb: str, args: dict[str, Any], reason: Reason
) -> None:
    async with desk() as d:
        assert (await d.refusal(verb, **args)).reason is reason


@in_loop
async def test_evictions_are_shown_and_set_in_either_spelling() -> None:
    async with desk() as d:
        await d.ask("eviction_set", model="a", eviction={"weights": "retain", "process": "stop"})
        await d.life.settled()
        shown = (await d.ask("eviction_get"))["models"]["a"]
        assert shown["eviction"] == {"weights": "retain", "process": "stop"}
        assert shown["process_state"] == "not_started"


@in_loop
async def test_logs_are_the_engine_s_last_lines_and_reload_is_passed_on() -> None:
    async with desk() as d:
        d.world.output["a"] = ["one", "two", "three"]
        assert await d.ask("logs", model="a", lines=2) == {"lines": ["two", "three"]}
        assert await d.ask("logs", model="a", lines=1) == {"lines": ["three"]}
        d.world.output["a before"] = ["zero"]
        assert await d.ask("logs", model="a", previous=True) == {"lines": ["zero"]}
        await d.ask("reload")
        assert d.reloads == 1


@in_loop
async def test_the_status_speaks_the_earlier_system_s_words() -> None:
    async with desk() as d:
        status = await d.ask("status")
        assert (status["state"], status["active_model"]) == ("idle", None)
        assert status["models"]["a"]["process_state"] == "not_started"
        await d.ask("load", model="a")
        status = await d.ask("status")
        assert (status["state"], status["active_model"]) == ("active:a", "a")
        assert status["models"]["a"]["process_state"] == "running"
        await d.ask("sleep", model="a", eviction="discard+keep_running")
        a = await d.model("a")
        assert a["process_state"] == "sleeping:Discard+KeepRunning"
        d.world.fail("engine.wait_healthy", model="b")
        await d.refusal("load", model="b")
        assert (await d.model("b"))["process_state"].startswith("failed:")
        line = one_line(d.life.loop.state)
        assert line == "no model active; 1 parked; failed: b"
        assert line.isascii()


@in_loop
async def test_the_status_names_both_sides_of_a_switch() -> None:
    async with desk() as d:
        await d.ask("load", model="a")
        hold = d.world.hold("engine.sleep")
        d.life.demand("b", waiting=1)
        await hold.reached.wait()
        assert (await d.ask("status"))["state"] == "switching:a->b"
        assert one_line(d.life.loop.state) == "no model active; switching:a->b"
        hold.release()
        await d.life.settled()
        assert (await d.ask("status"))["state"] == "active:b"


@in_loop
async def test_a_model_named_again_and_again_is_one() -> None:
    """A message holds a quarter of a million names; each would be an event of the loop's."""
    async with desk() as d:
        names = ["a", "b"] * 100
        given: list[tuple[str, ...]] = []
        d.verbs.orders.tell = lambda order, _what: given.append(order.models)
        await d.ask("pin", models=names[:1] * 100)
        assert set(given) == {("a",)}
        assert await d.ask("unpin", models=names) == {"message": "Unpinned: a, b"}


@in_loop
async def test_who_gives_an_order_is_told_in_one_short_line() -> None:
    """A gateway says by whom; events keep it, the journal and terminals show it."""
    async with desk() as d:
        given: list[str] = []
        d.verbs.orders.tell = lambda order, _what: given.append(order.by)
        await d.ask("load", model="a", by="\x1b[31mkey\n" + "x" * 100_000)
        assert {(by[:4], len(by)) for by in given} == {("keyx", 200)}


@in_loop
async def test_of_stale_engines_only_those_are_restarted() -> None:
    """Started otherwise than the configuration says now."""
    small = {"gpu_memory": 0.4}
    config = config_of(model("a", **small), model("b", **small), model("c", **small))
    async with desk(config) as d:
        for name in ("a", "b"):
            await d.ask("load", model=name)
        assert (await d.ask("restart", stale=True))["restarted"] == []
        changed = dict(config.models) | {"b": replace(config.models["b"], extra_args=("--x",))}
        d.life.loop.post(ConfigChanged(replace(config, models=MappingProxyType(changed))))
        await d.life.settled()
        answer = await d.ask("restart", stale=True)
        assert (answer["restarted"], answer["stopped"]) == (["b"], [])
        assert d.world.names("units.start") == ["units.start a", "units.start b", "units.start b"]
        refused = await d.refusal("restart", stale=False)
        assert '"models" must be a list' in str(refused)


RESTARTED = "nothing was restarted; they start as configured when they are asked for: a, b"


@pytest.mark.parametrize(
    ("verb", "args", "answer"),
    [
        ("load", {"model": "a"}, {"message": "Model a is serving"}),
        ("wake", {"model": "a"}, {"message": "Model a is serving"}),
        ("switch", {"model": "a"}, {"message": "Switched to model: a"}),
        ("unload", {"model": "a"}, {"message": "Model a is stopped"}),
        ("sleep", {"model": "a"}, {"message": "Model a is stopped", "state": "not_started"}),
        ("pin", {"model": "a"}, {"message": "Pinned to model: a"}),
        ("pin", {"models": ["a"]}, {"message": "Pinned: a"}),
        ("pin", {"models": ["a"], "seconds": 90}, {"message": "Pinned for 90 s: a"}),
        ("unpin", {}, {"message": "Unpinned; mode set to auto"}),
        ("unpin", {"models": ["b", "a"]}, {"message": "Unpinned: b, a"}),
        ("mode", {"mode": "manual"}, {"message": "Mode set to manual"}),
        ("mode", {"mode": "auto"}, {"message": "Mode set to auto"}),
        (
            "eviction_set",
            {"model": "a", "eviction": "retain+stop"},
            {"message": "Eviction of a set to retain+stop"},
        ),
        (
            "restart",
            {"models": ["a", "b"]},
            {"message": RESTARTED, "restarted": [], "stopped": ["a", "b"]},
        ),
        ("cancel", {}, {"message": "nothing to cancel"}),
        ("orders", {}, {"orders": []}),
        ("logs", {"model": "a"}, {"lines": []}),
        ("reload", {}, {"message": "configuration reloaded"}),
        ("images", {}, {"images": []}),
        ("image_prune", {}, {"message": "removed 0 images", "removed": [], "freed_bytes": 0}),
    ],
)
@in_loop
async def test_each_verb_answers_what_was_done(
    verb: str, args: dict[str, Any], answer: dict[str, Any]
) -> None:
    async with desk() as d:
        assert await d.ask(verb, **args) == answer


@pytest.mark.parametrize(
    ("phase", "why"),
    [
        (None, "it is not configured any more"),
        (Parked(DISCARD, 0.0, "the disk is full"), "the disk is full"),
        (Parked(DISCARD, 0.0), "it was parked by discard+keep_running meanwhile"),
        (Stopped(0.0, "it died"), "it died"),
        (Stopped(), "it was stopped instead"),
        (Failed(0.0, 1.0, "no memory"), "no memory"),
        (Serving("e1", 0.0), "it was woken again by a request"),
    ],
)
def test_an_image_that_was_not_made_has_its_reason(phase: Any, why: str) -> None:
    record = None if phase is None else ModelRecord(model("a"), phase)
    assert checkpoints._why_not(record) == why


@in_loop
async def test_the_steps_of_the_last_operation_are_shown_with_their_seconds() -> None:
    async with desk() as d:
        assert (await d.model("a"))["last_phases"] == {}
        await d.ask("load", model="a")
        phases = (await d.model("a"))["last_phases"]
        assert {"spawn", "wait_healthy"} <= set(phases)
        assert all(seconds >= 0 for seconds in phases.values())
        await d.ask("sleep", model="a")
        phases = (await d.model("a"))["last_phases"]
        assert "sleep" in phases
        assert "spawn" not in phases


@in_loop
async def test_a_model_that_cannot_be_warmed_up_leaves_the_others_to_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    config = config_of(model("a"), model("b"), model("c", eviction=STOP))
    async with desk(config) as d:
        d.world.fail("units.start", model="a")
        await warm_up(d.life.loop)
        assert [d.life.state_of(name) for name in "abc"] == ["failed", "parked", "stopped"]
        assert "cannot warm a up: cannot load a: " in caplog.text
        assert "b is warm" in caplog.text
        assert "c is warm" not in caplog.text
        assert to_warm(d.life.loop.state) == []


@pytest.mark.parametrize("place", [0, 1, 2])
@in_loop
async def test_of_lines_that_do_not_fit_into_a_message_the_last_are_told(place: int) -> None:
    async with desk() as d:
        lines = ["one", "two", "three"]
        lines[place] = "x" * MAX_LINE
        d.world.output["a"] = lines
        assert (await d.ask("logs", model="a"))["lines"] == lines[place + 1 :]
