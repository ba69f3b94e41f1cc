"""The page's own routes: its files with their headers, its feed and its history."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from sanic import Sanic

from llmux.errors import Reason, Refused
from llmux.gateway.ui import pages
from llmux.gateway.ui.pages import HEADERS, KEYS_MARK, STATIC, TYPES, add_ui_routes


class Board:
    """A board with one page. ``heard``: what it was asked for."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.heard: list[Any] = []
        self.sent: list[Any] = []

    async def attach(self, last: str, transport: Any) -> Any:
        self.heard.append((last, transport))
        return self

    def detach(self, page: Any) -> None:
        self.heard.append(page)

    async def history(self) -> bytes:
        return b"{}"

    async def respond(self, **given: Any) -> Board:
        self.sent.append(given)
        return self

    async def send(self, text: str) -> None:
        self.sent.append(text)

    async def eof(self) -> None:
        self.sent.append("eof")


def an_app(*, keys: bool) -> Any:
    app: Any = Sanic("llmux-test-pages", strict_slashes=True, configure_logging=False)
    board: Any = Board()
    add_ui_routes(app, board, keys=keys)
    Sanic.unregister_app(app)
    return app


def a_request(app: Any, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(app=app, headers=named, transport="wire", respond=app.ctx.board.respond)


@pytest.mark.parametrize("keys", [True, False])
def test_each_file_is_there_with_its_type_and_its_tag(keys: bool) -> None:
    async def body() -> None:
        app = an_app(keys=keys)
        files = [path for path in STATIC.iterdir() if path.suffix in TYPES]
        assert {path.suffix for path in files} >= {".html", ".css", ".js"}
        for path in files:
            answer = await pages._file(a_request(app), path.name)
            expected = path.read_bytes()
            if keys:
                expected = expected.replace(*KEYS_MARK)
            assert (answer.status, answer.body) == (200, expected)
            assert answer.content_type == TYPES[path.suffix]
            tag = f'"{hashlib.sha256(expected).hexdigest()[:16]}"'
            assert dict(answer.headers) == {**HEADERS, "etag": tag}
            again = await pages._file(a_request(app, if_none_match=tag), path.name)
            assert (again.status, again.body) == (304, b"")
            assert dict(again.headers) == {**HEADERS, "etag": tag}
            other = await pages._file(a_request(app, if_none_match='"x"'), path.name)
            assert other.status == 200
        page = await pages._page(a_request(app))
        assert (KEYS_MARK[1] in (page.body or b"")) is keys
        slash = await pages._slash(a_request(app))
        assert (slash.status, dict(slash.headers)) == (308, {"location": "ui/"})
        with pytest.raises(Refused, match=r"there is no file 'x{100}' of the page") as refused:
            await pages._file(a_request(app), "x" * 200)
        assert refused.value.reason is Reason.NOT_FOUND

    asyncio.run(body())


@pytest.mark.parametrize("last", ["", "board.7"])
def test_the_feed_is_the_boards_until_that_ends_it(last: str) -> None:
    async def body() -> None:
        app = an_app(keys=False)
        board = app.ctx.board
        request = a_request(app, **({"last_event_id": last} if last else {}))
        task = asyncio.create_task(pages._feed(request))
        await asyncio.sleep(0)
        kept = {"cache-control": "no-store", "x-accel-buffering": "no"}
        assert board.sent == [
            {"content_type": "text/event-stream", "headers": kept}, ": llmux\n\n",
        ]  # fmt: skip
        assert board.heard == [(last, "wire")]
        board.ended.set()
        await task
        assert (board.sent[-1], board.heard[-1]) == ("eof", board)
        cut = asyncio.create_task(pages._feed(a_request(an_app(keys=False))))
        await asyncio.sleep(0)
        cut.cancel()
        await asyncio.wait({cut})
        assert cut.cancelled()
        history = await pages._history(a_request(app))
        assert (history.body, history.content_type) == (b"{}", "application/json")
        assert dict(history.headers) == {
            "cache-control": "no-store", "x-content-type-options": "nosniff",
        }  # fmt: skip

    asyncio.run(body())
