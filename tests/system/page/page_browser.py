"""Debian's Chromium, driven by Playwright, which is in an environment of its own in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[3]
for folder in ("scripts", "tests/system", "tests/system/front", "tests/service"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))

from front_programs import need  # noqa: E402 (the path first)
from llmux_guest import host  # noqa: E402

TOOLS: Final = ("playwright==1.65.2", "axe-playwright-python==0.1.8")
# of axe-core 4.12.1
AXE_SHA256: Final = "84494fec757e4710dc751c8d7a636e457f4532f08f85c86dc9070133fbff53bc"
WAIT_MS: Final = 60_000


@dataclass
class Browser:
    """Contexts share the process. ``axe`` is the source of axe-core."""

    chromium: Any
    axe: str

    @contextlib.contextmanager
    def page(
        self, port: int, *, width: int = 1440, dark: bool = False, refusals: bool = False
    ) -> Iterator[Page]:
        """A tab of its own. When the block ends, nothing must have gone wrong in it.

        ``refusals``: answers of 401 and the like, and lost connections, are part of the test; the
        browser itself writes them to the console.
        """
        context = self.chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        context.set_default_timeout(WAIT_MS)
        page = Page(context.new_page(), port, self.axe)
        try:
            yield page
            wrong = [text for text in page.wrong if not (refusals and text.startswith(_NETWORK))]
            assert wrong == [], wrong
        finally:
            context.close()


_FEED: Final = """{
  const real = window.fetch;
  const start = (stream) => stream.enqueue(new TextEncoder().encode(TEXT));
  const feed = () => new Response(new ReadableStream({ start }));
  window.fetch = async (path, options) =>
    String(path).endsWith("ui/feed") ? feed() : real(path, options);
}"""
_NETWORK: Final = ("console: Failed to load resource",)


@dataclass
class Page:
    tab: Any
    port: int
    axe: str
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tab.on("console", self._console)
        self.tab.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.tab.on("request", self._request)
        self.tab.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith(f"http://127.0.0.1:{self.port}/"):
            self.wrong.append(f"another host: {request.url}")

    def open(self, view: str = "now", key: str | None = "sk-admin") -> None:
        self.tab.goto(f"http://127.0.0.1:{self.port}/ui/#{view}")
        if key is not None:
            self.give_key(key)

    def give_key(self, key: str) -> None:
        self.tab.get_by_role("button", name="Enter").click()
        self.tab.get_by_label("An admin key").fill(key)
        self.tab.get_by_role("button", name="Use this key").click()

    def answer(self, path: str, kind: str, body: str) -> None:
        """Have the browser get this instead of asking the server."""
        self.tab.route(path, lambda route: route.fulfill(content_type=kind, body=body))

    def feed(self, frame: dict[str, Any]) -> None:
        """Have the page get this frame in place of the server's, and no end."""
        text = f"id: x.1\ndata: {json.dumps(frame)}\n\n"
        self.tab.add_init_script(_FEED.replace("TEXT", json.dumps(text)))

    def see(self, selector: str, text: str | None = None) -> Any:
        """The first element of this kind (with this text), once it is visible."""
        found = self.tab.locator(selector)
        if text is not None:
            found = found.filter(has_text=text)
        found.first.wait_for()
        return found.first

    def row(self, model: str, text: str) -> Any:
        """The model's row, once it shows the text."""
        return self.see(f".models tr:has(button.name:text-is('{model}'))", text)

    def order(self, model: str, name: str, *, confirm: bool = True) -> None:
        """Give an order in the model's panel, which stays open."""
        if not self.tab.locator("#panel[open]").count():
            self.tab.locator(f".models button.name:text-is('{model}')").click()
        self.tab.locator("#panel .orders").get_by_role("button", name=name, exact=True).click()
        if confirm:
            self.tab.locator("#panel .confirm").get_by_role("button", name=name).click()

    def close_panel(self) -> None:
        self.tab.locator("#panel").get_by_role("button", name="Close").click()

    def check_accessibility(self, what: str) -> None:
        # by the debugger's protocol: the page's policy would refuse a script of ours
        self.tab.evaluate(self.axe)
        found = self.tab.evaluate(
            "axe.run(document, {resultTypes: ['violations']}).then((r) => r.violations.map("
            "(v) => v.id + ': ' + v.nodes.map((n) => n.target.join(' ')).join(', ')))"
        )
        assert found == [], what


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    program = need("chromium", "chromium")
    tools = host.environment("playwright", TOOLS)
    packages = next((tools / "lib").glob("python3.*/site-packages"))
    sys.path.append(str(packages))
    try:
        from playwright.sync_api import sync_playwright

        axe = (packages / "axe_playwright_python/axe.min.js").read_bytes()
        assert hashlib.sha256(axe).hexdigest() == AXE_SHA256
        with sync_playwright() as playwright:
            # root has no sandbox of Chromium's; what it shows here is only ours
            started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            try:
                yield Browser(started, axe.decode())
            finally:
                started.close()
    finally:
        sys.path.remove(str(packages))
