"""Only what a key may do is offered, and what it may not do is refused whatever the page offers."""

from __future__ import annotations

import pytest
from page_browser import Browser
from page_server import Daemon

pytestmark = [pytest.mark.system, pytest.mark.timeout(120, func_only=True)]

Server = tuple[Daemon, int]


def test_a_key_that_may_use_models_is_offered_just_that(browser: Browser, server: Server) -> None:
    daemon, port = server
    daemon.order("beta", tokens_per_sec=100)
    with browser.page(port, refusals=True) as page:
        page.open("logs/alpha", key="sk-beta")
        page.see("h1", "This key may use models")
        page.see("#bar .pill", "models only")
        assert page.tab.locator("#bar nav a").count() == 0
        assert page.tab.locator("#bar .pill").all_inner_texts() == ["models only", "key"]
        assert page.tab.locator("#try-model option").all_inner_texts() == ["beta"]
        page.check_accessibility("a key that may use models")
        page.tab.get_by_label("Prompt").fill("hello")
        page.tab.get_by_label("Tokens at most").fill("5")
        page.tab.get_by_role("button", name="Send").click()
        page.see(".answer .text", "beta")
        page.see(".figures", "First token after")
        for hash in ("#timeline", "#logs/beta", "#now"):
            page.tab.evaluate("(hash) => { location.hash = hash }", hash)
            page.see("#try-model")
            assert page.tab.locator("#bar nav a, .models, .drawing, #log-lines").count() == 0
        page.give_key("sk-admin")
        page.row("beta", "serving")
        assert page.tab.locator("#bar nav a").count() == 4


def test_a_key_without_models_is_told_so(browser: Browser, server: Server) -> None:
    with browser.page(server[1], refusals=True) as page:
        page.open(key="sk-nothing")
        page.see("h1", "This key may use models")
        page.see("p", "It may use no model that is configured")
        assert page.tab.locator("#try-model").count() == 0


def test_no_order_is_taken_without_a_key_that_may_give_it(browser: Browser, server: Server) -> None:
    """Asked by the page's own origin, with what a script in it could send."""
    daemon, port = server
    ask = """async ([path, key]) => {
      const headers = key ? { authorization: `Bearer ${key}` } : {};
      const body = JSON.stringify({ model: "alpha", models: ["alpha"], mode: "manual" });
      return (await fetch(`../${path}`, { method: "POST", body, headers })).status;
    }"""
    verbs = ("wake", "sleep", "pin", "unpin", "switch", "mode", "restart", "checkpoint", "cancel")
    paths = (*(f"control/{verb}" for verb in (*verbs, "eviction")), "unload")
    with browser.page(port, refusals=True) as page:
        page.open()
        page.row("alpha", "stopped")
        for path in paths:
            assert page.tab.evaluate(ask, [path, ""]) == 401, path
            assert page.tab.evaluate(ask, [path, "sk-beta"]) == 403, path
        page.row("alpha", "stopped")
        assert daemon.status()["mode"] == {"mode": "auto"}


def test_a_key_is_one_word(browser: Browser, server: Server) -> None:
    """What no header can hold is refused by the form, not by a broken connection."""
    with browser.page(server[1]) as page:
        page.open(key=None)
        page.give_key("sk-\u4f60")
        assert page.tab.evaluate("document.getElementById('key-field').validity.patternMismatch")
        page.see("#panel[open]")
