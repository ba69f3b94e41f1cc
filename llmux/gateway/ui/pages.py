"""The routes of the page: its files, which are the same for everyone, and its feed, which is not.

The files may be read without a key. The feed and the history are authorized as /control/status is.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from sanic import Request, Sanic
from sanic.response import HTTPResponse

from llmux.errors import Reason, Refused
from llmux.gateway.ui.board import Board

STATIC: Final = Path(__file__).with_name("static")
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
KEYS_MARK: Final = (
    b'<meta name="llmux-keys" content="no">',
    b'<meta name="llmux-keys" content="yes">',
)
# Nothing but the page's own files and this server; no markup from text, in no frame.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    body: bytes
    kind: str
    tag: str

    @classmethod
    def read(cls, path: Path, *, keys: bool) -> PageFile:
        body = path.read_bytes()
        if keys:
            body = body.replace(*KEYS_MARK)
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        return cls(body, TYPES[path.suffix], tag)


def add_ui_routes(app: Sanic[Any, Any], board: Board, *, keys: bool) -> None:
    """``keys``: whether the gateway has any, so that the page asks for one first."""
    app.ctx.board = board
    app.ctx.page_files = {
        path.name: PageFile.read(path, keys=keys)
        for path in STATIC.iterdir()
        if path.suffix in TYPES
    }
    app.add_route(_slash, "/ui", methods=["GET", "HEAD"])
    app.add_route(_page, "/ui/", methods=["GET", "HEAD"])
    app.add_route(_file, "/ui/static/<name:str>", methods=["GET", "HEAD"])
    app.add_route(_feed, "/ui/feed")
    app.add_route(_history, "/ui/history")


async def _slash(_request: Request) -> HTTPResponse:
    """The page's links are relative: it works below any prefix of a proxy."""
    return HTTPResponse(status=308, headers={"location": "ui/"})


async def _page(request: Request) -> HTTPResponse:
    return _answer(request, "index.html")


async def _file(request: Request, name: str) -> HTTPResponse:
    return _answer(request, name)


def _answer(request: Request, name: str) -> HTTPResponse:
    found = request.app.ctx.page_files.get(name)
    if found is None:
        raise Refused(Reason.NOT_FOUND, f"there is no file {name[:100]!r} of the page")
    headers = HEADERS | {"etag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return HTTPResponse(status=304, headers=headers)
    return HTTPResponse(found.body, headers=headers, content_type=found.kind)


async def _feed(request: Request) -> None:
    """Server-sent events: what changed on the board. Last-Event-ID continues."""
    board: Board = request.app.ctx.board
    response = await request.respond(
        content_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )
    await response.send(": llmux\n\n")
    transport = cast(asyncio.WriteTransport, request.transport)
    page = await board.attach(request.headers.get("last-event-id", ""), transport)
    try:
        await page.ended.wait()
        await response.eof()
    finally:
        board.detach(page)


async def _history(request: Request) -> HTTPResponse:
    board: Board = request.app.ctx.board
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return HTTPResponse(await board.history(), headers=headers, content_type="application/json")
