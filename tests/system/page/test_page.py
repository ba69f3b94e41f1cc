"""The page in a real Chromium, against ``llmux serve`` with stand-in engines: what it shows."""

from __future__ import annotations

import pytest
from page_browser import Browser
from page_server import Daemon, Door, served

from daemon_harness import in_background  # isort: skip

pytestmark = [pytest.mark.system, pytest.mark.timeout(120, func_only=True)]

OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
Server = tuple[Daemon, int]


# ---- the key -------------------------------------------------------------------------------------


def test_a_key_is_asked_for_once_and_kept_in_the_tab_alone(
    browser: Browser, server: Server
) -> None:
    _, port = server
    with browser.page(port, refusals=True) as page:
        page.open(key="sk-wrong")
        page.see("h1", "This key is not valid")
        page.give_key("sk-use")
        page.see("h1", "This key may use models")
        page.give_key("sk-admin")
        page.row("alpha", "stopped")
        page.tab.reload()
        page.row("alpha", "stopped")
        kept = page.tab.evaluate("[localStorage.length, document.cookie, location.href]")
        assert kept[:2] == [0, ""] and "sk-" not in kept[2]
    with browser.page(port) as other:
        other.open(key=None)
        other.see("h1", "A key is needed")


def test_without_keys_the_page_watches_and_says_why(browser: Browser) -> None:
    with served({"alpha": {}}, keys=False) as (daemon, port), browser.page(port) as page:
        daemon.load("alpha")
        page.open(key=None)
        page.row("alpha", "serving")
        page.see(".strip", "Watching only: without keys nothing that comes over TCP gives orders")
        page.tab.locator(".models button.name").click()
        page.see("#panel dt", "In flight")
        assert page.tab.locator("#panel .orders").count() == 0
        refused = page.tab.evaluate(
            "fetch('../control/pin', {method: 'POST', body: '{\"model\": \"alpha\"}'})"
            ".then((r) => r.status)"
        )
        assert refused == 403
        page.wrong = [text for text in page.wrong if "403" not in text]  # that one


# ---- now -----------------------------------------------------------------------------------------


def test_each_state_is_shown_while_it_lasts(browser: Browser, server: Server) -> None:
    daemon, port = server
    eviction = {"eviction": "offload+keep_running"}
    daemon.set_models({"alpha": eviction, "beta": eviction, "gamma": {}})
    daemon.order("gamma", die_at_start={"exit_code": 1, "lines": [OUT_OF_MEMORY]})
    with browser.page(port) as page:
        page.open()
        page.row("alpha", "stopped")
        assert daemon.ask("wake", model="gamma").status == 503
        page.row("gamma", "failed")
        page.row("gamma", "CUDA out of memory")
        page.row("gamma", "in 2")  # tried again in 20-odd seconds
        daemon.order("alpha", startup_secs=2.5)
        daemon.order("beta", slow_sleep_secs=2.5, slow_wake_secs=2.5, tokens_per_sec=20)
        loading = in_background(lambda: daemon.load("alpha"))
        page.row("alpha", "starting")
        page.see(".under-way", "alpha")
        page.row("alpha", "serving")
        loading.result(20)
        page.see(".gpu", "90 % claimed")
        daemon.load("beta")
        page.row("alpha", "parked")
        with daemon.stream("beta", max_tokens=80, ignore_eos=True) as stream:
            stream.wait_for_token()
            page.row("beta", "1")
            waiting = in_background(lambda: daemon.chat("alpha"))
            page.row("beta", "draining")
            page.see(".queue li", "alpha")
            stream.rest()
        page.row("beta", "parking")
        waiting.result(20)
        page.row("beta", "parked")
        page.row("alpha", "serving")
        back = in_background(lambda: daemon.chat("beta"))
        page.row("beta", "waking")
        back.result(20)


def test_a_reload_adds_and_removes_rows(browser: Browser, server: Server) -> None:
    daemon, port = server
    with browser.page(port) as page:
        page.open()
        page.row("beta", "stopped")
        daemon.set_models({"alpha": {}, "gamma-2": {}})
        page.row("gamma-2", "stopped")
        page.tab.locator("button.name:text-is('beta')").wait_for(state="detached")


def test_a_pin_that_ends_is_shown_with_its_end(browser: Browser, server: Server) -> None:
    daemon, port = server
    pinned = daemon.request("POST", "/control/pin", {"models": ["alpha"], "seconds": 3600})
    assert pinned.status == 200, pinned.body
    with browser.page(port) as page:
        page.open()
        page.row("alpha", "pinned")
        page.tab.locator(".models button.name:text-is('alpha')").click()
        page.see("#panel dd", "for another 59 min")
        page.see("#panel .orders button", "Unpin")


# ---- the timeline --------------------------------------------------------------------------------


def test_the_timeline_shows_stays_waits_and_failures(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.order("beta", die_at_start={"exit_code": 1, "lines": [OUT_OF_MEMORY]})
    daemon.order("alpha", startup_secs=1.5)
    assert daemon.chat("alpha").status == 200
    daemon.chat("beta")
    with browser.page(port) as page:
        page.open("timeline")
        page.see(".drawing .failed")
        page.see(".events li", "starting → serving")
        titles = page.tab.locator(".drawing title").all_text_contents()
        stays = [text for text in titles if text.startswith("alpha serving on GPU 0")]
        assert any("; switch of" in text for text in stays), titles
        assert any(text.startswith("alpha: up to 1 request waited") for text in titles), titles
        chart = page.tab.locator(".chart")
        chart.focus()
        page.tab.keyboard.press("ArrowDown")
        page.see(".figures", " on GPU 0, ")
        before = page.see(".tools").inner_text()
        page.tab.keyboard.press("+")
        page.tab.wait_for_function(
            "(before) => document.querySelector('.tools').innerText !== before", arg=before
        )
        page.tab.keyboard.press("Home")
        page.see(".tools", "last 1 h")
        page.tab.keyboard.press("ArrowLeft")
        page.tab.keyboard.press("+")
        page.tab.keyboard.press("ArrowLeft")
        page.see(".tools button", "Return to now").click()
        page.see(".tools", "last 30 min")
        daemon.reload()
        page.tab.reload()
        page.see(".drawing .failed")


# ---- a cut and a return --------------------------------------------------------------------------


def test_a_page_that_was_cut_off_says_so_and_catches_up(browser: Browser, server: Server) -> None:
    daemon, target = server
    door = Door(target)
    try:
        with browser.page(door.port, refusals=True) as page:
            page.open()
            page.row("alpha", "stopped")
            page.see("#bar .pill", "live")
            door.close()
            page.see("#bar .strip.bad", "Cut off")
            daemon.load("alpha")
            page.row("alpha", "stopped")
            door.open()
            page.row("alpha", "serving")
            page.see("#bar .pill", "live")
            assert page.tab.locator("#bar .strip.bad").count() == 0
    finally:
        door.close()


def test_a_page_outlasts_a_restart(browser: Browser) -> None:
    with served({"alpha": {}}) as (daemon, port), browser.page(port, refusals=True) as page:
        page.open()
        page.row("alpha", "stopped")
        daemon.stop()
        page.see("#bar .strip.bad", "Cut off")
        daemon.models["beta"] = {}
        (daemon.directory / "notify.sock").unlink()
        daemon.start()
        page.row("beta", "stopped")
        page.see("#bar .pill", "live")
