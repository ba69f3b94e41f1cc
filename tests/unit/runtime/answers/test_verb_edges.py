"""The verbs that move models, at the edges of what they take."""

from __future__ import annotations

from typing import Any

import pytest
from desks import desk
from runtime_harness import config_of, in_loop, model

from llmux.protocol import MAX_LINE


@in_loop
async def test_a_restart_brings_back_what_served_and_stops_the_rest() -> None:
    config = config_of(*(model(name, gpu_memory=0.3) for name in "abc"))
    async with desk(config) as d:
        for name in "ab":
            await d.ask("load", model=name)
        await d.ask("sleep", model="b")
        answer = await d.ask("restart", models=["a", "b", "c"])
        assert answer == {
            "message": "restarted: a; they start as configured when they are asked for: b, c",
            "restarted": ["a"], "stopped": ["b", "c"],
        }  # fmt: skip
        assert await d.ask("restart", model="a") == {
            "message": "restarted: a", "restarted": ["a"], "stopped": []
        }  # fmt: skip
        assert [d.life.state_of(name) for name in "abc"] == ["serving", "stopped", "stopped"]


@in_loop
async def test_a_switch_leaves_a_pin_of_the_other_kind_where_it_is() -> None:
    async with desk() as d:
        await d.ask("mode", mode="manual")
        await d.ask("switch", model="a")
        assert (await d.ask("status"))["mode"] == {"mode": "manual"}


@pytest.mark.parametrize("seconds", [0, -1, True, "1", 1 << 63, float("nan")])
@in_loop
async def test_a_pin_has_seconds_above_nothing_and_below_what_can_be_written(seconds: Any) -> None:
    async with desk() as d:
        refused = await d.refusal("pin", models=["a"], seconds=seconds)
        assert f'"seconds" must be above 0, not {seconds!r}' in str(refused)
        assert (await d.ask("status"))["mode"] == {"mode": "auto"}
        for wrong in ({"models": "a"}, {}, {"models": [7]}, {"models": ["x"]}):
            await d.refusal("pin", **wrong)


@in_loop
async def test_a_pin_that_failed_leaves_the_one_before_it() -> None:
    async with desk() as d:
        await d.ask("pin", models=["a"], seconds=1000.5)
        before = dict(d.life.loop.state.pins)
        d.world.fail("units.start")
        await d.ask("unload", model="a")
        await d.refusal("pin", models=["a"])
        await d.life.settled()
        assert d.life.loop.state.pins == before
        await d.ask("unpin", models=["a"])
        assert "Pinned for 0.5 s: a" in (await d.ask("pin", models=["a"], seconds=0.5))["message"]


@pytest.mark.parametrize(("more", "kept"), [(0, 1), (1, 0)])
@in_loop
async def test_lines_fill_half_a_message_to_its_last_byte(more: int, kept: int) -> None:
    async with desk() as d:
        d.world.output["a"] = ["x" * (MAX_LINE // 2 - 3 + more)]  # two quotes, and what parts it
        assert len((await d.ask("logs", model="a"))["lines"]) == kept


@in_loop
async def test_lines_before_one_that_does_not_fit_are_left_out_with_it() -> None:
    async with desk() as d:
        d.world.output["a"] = ["first", "x" * (MAX_LINE // 2), "last but one", "last"]
        assert (await d.ask("logs", model="a"))["lines"] == ["last but one", "last"]


@pytest.mark.parametrize(
    ("args", "first"),
    [({}, 50), ({"lines": 1}, 149), ({"lines": 149}, 1), ({"lines": 150}, 0), ({"lines": 999}, 0)],
)
@pytest.mark.parametrize("previous", [True, False])
@in_loop
async def test_a_hundred_lines_are_shown_or_as_many_as_were_asked_for(
    args: dict[str, Any], first: int, previous: bool
) -> None:
    async with desk() as d:
        d.world.output |= {"a": [f"{n}" for n in range(150)], "a before": ["former"] * 150}
        shown = (await d.ask("logs", model="a", **args, previous=previous))["lines"]
        assert shown == ["former" if previous else f"{n}" for n in range(first, 150)]
        if not previous:
            assert (await d.ask("logs", model="a", **args))["lines"] == shown


@pytest.mark.parametrize("lines", [0, -1, "5", 1.5, None])
@in_loop
async def test_lines_are_a_whole_number_above_nothing(lines: Any) -> None:
    async with desk() as d:
        refused = await d.refusal("logs", model="a", lines=lines)
        assert str(refused) == f"cannot show {lines!r} lines: a whole number > 0"
