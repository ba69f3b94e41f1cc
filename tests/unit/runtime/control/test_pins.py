"""Pins: per model, several, for a time; the earlier system's pin with manual mode stays."""

from __future__ import annotations

import pytest
from runtime_harness import config_of, in_loop, model
from test_verbs import desk

from llmux.config.schema import Config
from llmux.errors import Reason


def three() -> Config:
    half = {"gpu_memory": 0.45}
    return config_of(model("a", **half), model("b", **half), model("c"))


@in_loop
async def test_several_models_are_pinned_and_one_is_unpinned() -> None:
    async with desk(three()) as d:
        assert await d.ask("pin", models=["a", "b"]) == {"message": "Pinned: a, b"}
        assert (await d.ask("status"))["mode"] == {"mode": "auto", "pins": ["a", "b"]}
        assert (await d.model("a"))["pinned"]
        assert not (await d.model("c"))["pinned"]
        refused = await d.refusal("load", model="c")
        assert refused.reason is Reason.PINNED
        assert "llmux unpin a b" in str(refused)
        assert await d.ask("unpin", models=["a"]) == {"message": "Unpinned: a"}
        await d.life.settled()
        assert (await d.ask("status"))["mode"]["pins"] == ["b"]
        await d.ask("unpin")
        await d.life.settled()
        assert (await d.ask("status"))["mode"] == {"mode": "auto"}
        await d.ask("load", model="c")


@in_loop
async def test_a_pin_for_a_time_says_how_long() -> None:
    async with desk(three()) as d:
        assert (await d.ask("pin", models=["a"], seconds=60))["message"] == "Pinned for 60 s: a"
        assert 0 < (await d.model("a"))["pinned_secs"] <= 60
        await d.ask("pin", models=["a"])
        assert (await d.model("a"))["pinned_secs"] is None


@in_loop
async def test_a_model_that_cannot_be_loaded_is_not_pinned() -> None:
    async with desk(three()) as d:
        d.world.fail("units.start")
        await d.refusal("pin", models=["a"])
        await d.life.settled()
        assert (await d.ask("status"))["mode"] == {"mode": "auto"}


@pytest.mark.parametrize(
    "args",
    [{"models": "a"}, {"models": ["nobody"]}, {"models": ["a"], "seconds": 0},
     {"models": ["a"], "seconds": "long"}],
)  # fmt: skip
@in_loop
async def test_what_is_pinned_is_named_and_for_a_time_above_zero(args: dict[str, object]) -> None:
    async with desk(three()) as d:
        refused = await d.refusal("pin", **args)
        assert refused.reason in (Reason.BAD_REQUEST, Reason.UNKNOWN_MODEL)
        assert (await d.refusal("unpin", models="a")).reason is Reason.BAD_REQUEST
