"""Orders, output and a prompt, given in the page and seen in llmux."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from page_browser import Browser
from page_server import Daemon

from daemon_harness import POLICY, in_background  # isort: skip

pytestmark = [pytest.mark.system, pytest.mark.timeout(120, func_only=True)]

OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
Server = tuple[Daemon, int]


# ---- orders --------------------------------------------------------------------------------------


def test_a_load_shows_its_progress_and_its_end(browser: Browser, server: Server) -> None:
    daemon, port = server
    # A model of its own, since a bar ends when the usual time of a model's starts has passed.
    daemon.set_models({"alpha": {}, "beta": {}, "slow": {}})
    daemon.order("slow", startup_secs=8)  # many of the page's looks
    daemon.load("slow")  # from here on it is known how long a start takes
    daemon.park("slow", "retain+stop")
    with browser.page(port) as page:
        page.open()
        page.order("slow", "Load")
        page.see("#panel h2", "starting")
        page.see("#panel dt", "Under way")
        shown = page.see("#panel [role=progressbar]").get_attribute("aria-valuenow")
        assert 0 <= int(shown) <= 100
        page.see(".way-when", "left")
        page.see("#panel .strip.good", "Model slow is serving")
        page.see("#panel h2", "serving")


def test_an_order_says_what_it_costs_and_can_be_taken_back(
    browser: Browser, server: Server
) -> None:
    daemon, port = server
    daemon.order("alpha", tokens_per_sec=20)
    daemon.load("alpha")
    with (
        browser.page(port) as page,
        daemon.stream("alpha", max_tokens=1000, ignore_eos=True) as stream,
    ):
        stream.wait_for_token()
        page.open()
        page.row("alpha", "1")
        page.order("alpha", "Unload", confirm=False)
        limit = f"{POLICY['drain_timeout_secs']} s"
        page.see("#panel .confirm", f"1 request in flight is cut unless finished within {limit}")
        page.tab.locator("#panel").get_by_role("button", name="Back").click()
        page.see("#panel .orders button", "Unload")
        assert daemon.model("alpha")["state"] == "serving"


def test_a_pin_is_set_seen_and_released(browser: Browser, server: Server) -> None:
    daemon, port = server
    with browser.page(port) as page:
        page.open()
        page.order("alpha", "Pin")
        page.see("#panel .strip.good", "Pinned: alpha")
        page.see("#panel dd", "until it is unpinned")
        page.see(".models .tag", "pinned")
        assert daemon.status()["mode"] == {"mode": "auto", "pins": ["alpha"]}
        page.order("alpha", "Unpin", confirm=False)
        page.see("#panel .strip.good", "Unpinned: alpha")
        page.tab.locator(".models .tag").wait_for(state="detached")


def test_manual_mode_is_set_seen_and_left(browser: Browser, server: Server) -> None:
    daemon, port = server
    with browser.page(port) as page:
        page.open()
        page.tab.get_by_role("button", name="Mode: automatic").click()
        page.tab.get_by_role("button", name="Make it manual").click()
        page.see("#panel .strip.good", "Mode set to manual")
        assert daemon.status()["mode"] == {"mode": "manual"}
        assert daemon.ask("pin", model="alpha").status == 200  # as the earlier system had it
        page.see("#panel p", "alpha is pinned")
        page.tab.get_by_role("button", name="Return to automatic").click()
        page.close_panel()
        page.see("#bar button", "automatic")


def test_a_model_is_parked_woken_and_restarted(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.set_models({"alpha": {"eviction": "offload+keep_running"}})
    daemon.load("alpha")
    with browser.page(port) as page:
        page.open()
        page.order("alpha", "Park")
        page.see("#panel .strip.good", "Model alpha is parked")
        page.see("#panel dd", "offload+keep_running")
        page.order("alpha", "Load")
        page.see("#panel .strip.good", "Model alpha is serving")
        before = daemon.model("alpha")["pid"]
        page.order("alpha", "Restart")
        page.see("#panel .strip.good", "estarted")
        assert daemon.model("alpha")["pid"] != before
        page.order("alpha", "Unload")
        page.see("#panel .strip.good", "unloaded")
        page.see("#panel h2", "stopped")


def test_an_engine_that_takes_its_time_to_end_is_shown(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.set_models({"alpha": {"stop_grace_secs": 6, "eviction": "offload+keep_running"}})
    daemon.order("alpha", ignore_sigterm=True)  # until it is killed, after that grace
    daemon.load("alpha")
    daemon.park("alpha")
    with browser.page(port) as page:
        page.open()
        page.row("alpha", "parked")
        page.order("alpha", "Unload")
        page.row("alpha", "stopping")
        page.see("#panel .strip.good", "unloaded")
        page.row("alpha", "stopped")


def test_a_start_is_cancelled(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.order("alpha", startup_secs=60)
    with browser.page(port, refusals=True) as page:
        page.open()
        waiting = in_background(lambda: daemon.chat("alpha"))
        page.row("alpha", "starting")
        page.order("alpha", "Cancel the start")
        page.see("#panel .strip.good", "unloaded")
        assert waiting.result(20).status == 503
        page.close_panel()
        page.row("alpha", "stopped")


def test_an_order_of_another_is_seen_and_cancelled(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.order("beta", startup_secs=60)
    with browser.page(port) as page:
        page.open()
        given = in_background(lambda: daemon.ask("wake", model="beta"))
        page.see(".order", "wake beta")
        page.tab.locator(".order button").click()
        page.see(".toast", "cancelled: ")
        assert given.result(20).code == "cancelled"
        page.tab.locator(".order").wait_for(state="detached")


def test_an_order_that_fails_says_why(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.order("alpha", die_at_start={"exit_code": 1, "lines": [OUT_OF_MEMORY]})
    with browser.page(port, refusals=True) as page:
        page.open()
        page.order("alpha", "Load")
        page.see("#panel .strip.bad", "CUDA out of memory")
        page.see("#panel dt", "Last failure")


def test_a_load_names_who_has_to_leave(browser: Browser, server: Server) -> None:
    """Also for a model that was never on a GPU."""
    daemon, port = server
    daemon.set_models({"alpha": {}, "gamma-3": {}})
    with browser.page(port) as page:
        page.open()
        page.order("gamma-3", "Load", confirm=False)
        page.see("#panel .confirm", "There is room: no model has to leave.")
        daemon.load("alpha")
        page.see("#panel .confirm", "Models that may have to leave: alpha (idle)")


# ---- an image ------------------------------------------------------------------------------------


def test_an_image_is_asked_for_and_its_end_is_told(browser: Browser, server: Server) -> None:
    """Embedded there is no checkpointer: the model is shown as one that has one, and the order is
    taken on its way. ``tests/system/parking`` makes images, in guests."""
    daemon, port = server
    daemon.load("alpha")
    rows = daemon.status()["models"]
    now = time.time()
    row = rows["alpha"] | {"since": now, "eviction": "discard+checkpoint", "in_flight": 2}
    head = {"version": "1", "host": "h", "may_order": True, "gpu_count": 1, "supervisor": "up",
            "mode": {"mode": "auto"}, "drain_timeout_secs": 120}  # fmt: skip
    full = {"now": now, "full": True, "head": head, "models": {"alpha": row, "beta": rows["beta"]}}
    asked: list[Any] = []
    answers = [
        (200, {"message": "Model alpha has an image in /images/alpha/current"}),
        (500, {"error": {"message": "cannot checkpoint alpha: the disk is full"}}),
    ]

    def take(route: Any) -> None:
        asked.append((route.request.headers["authorization"], route.request.post_data_json))
        status, body = answers[len(asked) - 1]
        route.fulfill(status=status, content_type="application/json", body=json.dumps(body))

    with browser.page(port, refusals=True) as page:
        page.feed(full)
        page.tab.route("**/control/checkpoint", take)
        page.open()
        page.order("alpha", "Make an image", confirm=False)
        page.see("#panel .confirm", "It leaves its GPU while its image is written")
        page.see("#panel .confirm", "2 requests in flight are cut unless finished within 2 min")
        assert asked == [], "asked before it was confirmed"
        page.tab.locator("#panel").get_by_role("button", name="Back").click()
        page.order("alpha", "Make an image")
        page.see("#panel .strip.good", "Model alpha has an image in /images/alpha/current")
        page.order("alpha", "Make an image")
        page.see("#panel .strip.bad", "the disk is full")
        assert asked == [("Bearer sk-admin", {"model": "alpha"})] * 2
        page.close_panel()
        page.tab.locator(".models button.name:text-is('beta')").click()
        page.see("#panel .orders button", "Load")
        image = page.tab.locator("#panel .orders").get_by_role("button", name="Make an image")
        assert image.count() == 0, "its eviction makes none"


# ---- logs and a prompt ---------------------------------------------------------------------------


def test_logs_are_live_searched_and_held(browser: Browser, server: Server) -> None:
    daemon, port = server
    with browser.page(port) as page:
        page.open("logs/alpha")
        page.see("#log-lines")
        daemon.load("alpha")
        page.see("#log-lines div", "Application startup complete")
        page.tab.get_by_label("Search").fill("STARTUP COMPLETE")
        shown = page.tab.locator("#log-lines div:visible")
        found = shown.all_inner_texts()
        assert found and all("startup complete" in line for line in found)
        page.tab.get_by_label("Search").fill("")
        page.tab.get_by_role("button", name="Pause").click()
        daemon.park("alpha", "retain+stop")
        page.see("button", "Go on (")
        before = page.tab.locator("#log-lines div").count()
        page.tab.get_by_role("button", name=re.compile(r"Go on \([1-9]")).click()
        assert page.tab.locator("#log-lines div").count() > before


def test_the_choice_of_a_model_follows_the_way_back(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.load("alpha")
    with browser.page(port) as page:
        page.open("logs/alpha")
        page.see("#log-lines div", "Application startup complete")
        page.tab.get_by_label("Model").select_option("beta")
        page.see("#log-lines[aria-label='Output of beta']")
        page.tab.go_back()
        page.see("#log-lines div", "Application startup complete")
        assert page.tab.get_by_label("Model").input_value() == "alpha"


def test_a_prompt_streams_with_its_figures(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.order("beta", tokens_per_sec=40)
    with browser.page(port) as page:
        page.open("try/beta")
        # A page may begin with a state of a second ago, in which another test had no beta.
        page.tab.get_by_label("Model").select_option("beta")
        page.tab.get_by_label("Prompt").fill("<b>hello</b>")
        page.tab.get_by_label("Tokens at most").fill("30")
        page.tab.get_by_role("button", name="Send").click()
        page.see(".answer .text", "beta")
        page.see(".figures", "tokens/s")
        page.see(".figures", "First token after")
        page.tab.get_by_role("button", name="Stop").wait_for(state="detached")
        tokens = re.search(r"(\d+) tokens ·", page.see(".figures").inner_text())
        assert tokens and 1 < int(tokens[1]) <= 30
