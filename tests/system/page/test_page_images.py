"""The button that makes an image, with the real supervisor on twins of CRIU, CUDA and engines."""

from __future__ import annotations

import pytest
from page_browser import Browser
from page_twins import on_twins

from llmux.config.schema import Eviction, ModelConfig, Process, Weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(120, func_only=True)]

IMAGE = Eviction(Weights.DISCARD, Process.CHECKPOINT)
OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)


def test_an_image_is_made_and_the_model_wakes_from_it(browser: Browser) -> None:
    alpha = ModelConfig("alpha", "models/alpha", eviction=IMAGE)
    with on_twins(alpha) as twins, browser.page(twins.port) as page:
        held = twins.world.hold("checkpointer.dump")
        page.open()
        page.row("alpha", "stopped")
        page.order("alpha", "Make an image", confirm=False)
        page.see("#panel .confirm", "It is started")
        page.tab.locator("#panel").get_by_role("button", name="Back").click()
        page.see("#panel h2", "stopped")
        assert twins.world.names("checkpointer.dump") == []
        page.order("alpha", "Make an image")
        page.see("#panel h2", "parking")
        page.see(".order", "checkpoint alpha, by key admin")
        twins.release(held)
        page.see("#panel .strip.good", "Model alpha has an image in /images/alpha/current")
        page.row("alpha", "parked")
        page.see(".models .tag", "image")
        page.order("alpha", "Load")
        page.see("#panel .strip.good", "Model alpha is serving")
        assert twins.world.names("checkpointer.restore") == ["checkpointer.restore alpha"]


def test_an_image_that_cannot_be_made_says_why(browser: Browser) -> None:
    alpha = ModelConfig("alpha", "models/alpha", eviction=IMAGE)
    beta = ModelConfig("beta", "models/beta", eviction=OFFLOAD)
    with on_twins(alpha, beta) as twins, browser.page(twins.port, refusals=True) as page:
        twins.world.fail("checkpointer.dump", always=True)
        page.open()
        page.order("alpha", "Make an image")
        page.see("#panel .strip.bad", "cannot checkpoint alpha")
        page.close_panel()
        page.tab.locator(".models button.name:text-is('beta')").click()
        page.see("#panel .orders button", "Load")
        image = page.tab.locator("#panel .orders").get_by_role("button", name="Make an image")
        assert image.count() == 0, "its eviction makes none"
