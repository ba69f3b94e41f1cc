"""Text stays text, no other site reaches the page, and everyone can use it."""

from __future__ import annotations

import http.server
import json
import threading
import time
from typing import Any

import pytest
from page_browser import Browser
from page_server import Daemon

pytestmark = [pytest.mark.system, pytest.mark.timeout(120, func_only=True)]

OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
Server = tuple[Daemon, int]


# ---- security ------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'`"


def test_markup_is_shown_as_text(browser: Browser, server: Server) -> None:
    """In names, reasons and events of a feed, and in an engine's own lines and errors."""
    daemon, port = server
    daemon.order("alpha", die_at_start={"exit_code": 1, "lines": [HOSTILE]})
    assert daemon.ask("wake", model="alpha").status == 503
    real = daemon.model("alpha")
    now = time.time()
    fields = ("why", "message", "phase_text", "image", "engine_version")
    row = real | dict.fromkeys(fields, HOSTILE)
    row |= {"since": now, "oldest_since": now, "queue_depth": 1}
    head = {"version": HOSTILE, "host": HOSTILE, "may_order": True, "gpu_count": 1,
            "mode": {"mode": "manual", "pinned": HOSTILE}, "supervisor": HOSTILE,
            "drain_timeout_secs": 1, "gpu_observer": HOSTILE}  # fmt: skip
    full = {"now": now, "full": True, "head": head, "models": {HOSTILE: row}}
    event = {"id": 1, "time": now - 5, "model": HOSTILE, "type": "transition", "from": "stopped",
             "to": "failed", "reason": HOSTILE, "gpus": [0], "duration_secs": 1}  # fmt: skip
    with browser.page(port, refusals=True) as page:
        page.open("logs/alpha")
        page.see("#log-lines div", HOSTILE)
        page.open(key=None)
        page.row("alpha", "<img src=x")
    with browser.page(port, refusals=True) as page:
        answers = {
            "feed": ("text/event-stream", f"id: x.1\ndata: {json.dumps(full)}\n\n"),
            "history": ("application/json", json.dumps({"now": now, "events": [event]})),
        }
        for name, (kind, body) in answers.items():
            page.answer(f"**/ui/{name}", kind, body)
        page.open()
        page.see("button.name", HOSTILE).click()
        page.see("#panel dd", HOSTILE)
        page.close_panel()
        for view in ("timeline", "try", "logs"):
            page.tab.goto(f"http://127.0.0.1:{port}/ui/#{view}")
            page.see(f".view.{view}")
        page.tab.goto(f"http://127.0.0.1:{port}/ui/#timeline")
        page.see(".events li", HOSTILE)
        assert page.tab.locator("img, body script").count() == 0


def test_the_policy_stops_what_gets_in(browser: Browser, server: Server) -> None:
    _, port = server
    with browser.page(port) as page:
        page.open()
        page.row("alpha", "stopped")
        attempts: dict[str, str] = {
            "markup": "document.body.innerHTML = '<b>x</b>'",
            "code": "setTimeout('window.ran = 1')",
        }
        for name, code in attempts.items():
            refused = page.tab.evaluate(
                f"() => {{ try {{ {code}; return false }} catch (e) {{ return e.name }} }}"
            )
            assert refused == "TypeError", name
        sent = page.tab.evaluate("fetch('http://127.0.0.1:9/').then(() => 1, () => 'refused')")
        assert sent == "refused"
        assert len(page.wrong) >= 3 and all(
            "Content Security Policy" in text
            or "requires 'Trusted" in text
            or "127.0.0.1:9" in text
            for text in page.wrong
        ), page.wrong
        page.wrong.clear()


class _Framing(http.server.BaseHTTPRequestHandler):
    target = 0

    def do_GET(self) -> None:
        body = f'<iframe src="http://127.0.0.1:{self.target}/ui/"></iframe>'.encode()
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def test_no_other_page_can_frame_it(browser: Browser, server: Server) -> None:
    _, port = server
    handler = type("Framing", (_Framing,), {"target": port})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as framing:
        threading.Thread(target=framing.serve_forever, daemon=True).start()
        with browser.page(framing.server_port, refusals=True) as page:
            page.tab.goto(f"http://127.0.0.1:{framing.server_port}/")
            page.tab.wait_for_load_state("networkidle")
            inner = page.tab.frames[1]
            assert "chrome-error" in inner.url or inner.locator("#bar").count() == 0
            assert any("frame-ancestors" in text for text in page.wrong), page.wrong
            page.wrong.clear()
        framing.shutdown()


# ---- for everyone --------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1440, False)])
def test_axe_finds_nothing(browser: Browser, server: Server, width: int, dark: bool) -> None:
    daemon, port = server
    daemon.order("beta", die_at_start={"exit_code": 1, "lines": [OUT_OF_MEMORY]})
    daemon.chat("beta")
    daemon.load("alpha")
    with browser.page(port, width=width, dark=dark) as page:
        page.open(key=None)
        page.see("h1", "A key is needed")
        page.check_accessibility("the key")
        page.give_key("sk-admin")
        page.row("alpha", "serving")
        page.check_accessibility("now")
        page.tab.locator(".models button.name").first.click()
        page.see("#panel dl")
        page.check_accessibility("a model")
        page.close_panel()
        for view, sign in (
            ("timeline", ".events li"),
            ("try", "#try-prompt"),
            ("logs/alpha", "#log-lines div"),
        ):
            page.tab.goto(f"http://127.0.0.1:{port}/ui/#{view}")
            page.see(sign)
            page.check_accessibility(view)
        wide = page.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, "nothing is wider than the screen"


def test_the_keyboard_reaches_an_order(browser: Browser, server: Server) -> None:
    _, port = server
    with browser.page(port) as page:
        page.open()
        page.row("alpha", "stopped")
        page.tab.locator(".models button.name").first.focus()
        page.tab.keyboard.press("Enter")
        page.see("#panel[open]")
        page.tab.locator("#panel .orders").get_by_role("button", name="Load").focus()
        page.tab.keyboard.press("Enter")
        page.see("#panel .confirm")
        page.tab.keyboard.press("Enter")  # the question has the focus
        page.see("#panel .strip.good", "serving")
        page.tab.keyboard.press("Escape")
        page.tab.locator("#panel[open]").wait_for(state="detached")
