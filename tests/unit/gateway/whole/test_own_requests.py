"""What a worker's own routes ask for, wait for and tell; when its sockets are served."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

import pytest
from gateway_desk import Desk, a_request, body_of, in_a_loop
from sanic import Sanic

from llmux.errors import Reason, Refused
from llmux.gateway.control import observation
from llmux.gateway.control.app import build_app
from llmux.gateway.control.context import Context
from llmux.gateway.server import _listen
from llmux.gateway.ui.pages import add_ui_routes


class Page:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def scrape(self, accept: str, timeout: str) -> tuple[bytes, str]:
        self.asked.append((accept, timeout))
        return b"a 1\n", "text/x-numbers"


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ({}, ("", "")),
        ({"accept": "text/plain"}, ("text/plain", "")),
        ({"x-prometheus-scrape-timeout-seconds": "3"}, ("", "3")),
    ],
)
@in_a_loop
async def test_the_numbers_come_as_they_are_asked_for(
    headers: dict[str, str], asked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, page = Desk(monkeypatch), Page()
    request = a_request(desk, headers=headers)
    request.app.ctx.context = Context(desk.worker, page)  # type: ignore[arg-type]
    response = await observation._metrics(request)
    assert (response.body, response.content_type) == (b"a 1\n", "text/x-numbers")
    assert page.asked == [asked]
    whole = await observation._metrics(a_request(desk))
    assert b"llmux_gateway_workers 1.0" in bytes(whole.body or b"")


OURS = """
GET /control/eviction  GET /control/status  POST /control/cancel  POST /control/checkpoint
POST /control/eviction  POST /control/mode  POST /control/pin  POST /control/restart
POST /control/sleep  POST /control/switch  POST /control/unpin  POST /control/wake
GET /events  GET,HEAD /health  GET,HEAD /health/live  GET,HEAD /health/ready
GET,HEAD /health/weights  GET /logs  GET /logs/<model:path>  GET /logs/stream/<model:path>
GET,HEAD /metrics  GET,HEAD /models  GET,HEAD /openapi.json  GET /running  GET,HEAD /ui
GET,HEAD /ui/  GET /ui/feed  GET /ui/history  GET,HEAD /ui/static/<name:str>
GET,POST /unload  GET,HEAD /v1/models  GET,HEAD /v1/models/<model:path>
"""


@in_a_loop
async def test_the_application_has_these_routes_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    board: Any = object()
    app = build_app(desk.config, desk.dispatch, desk.page)
    add_ui_routes(app, board, keys=False)
    Sanic.unregister_app(app)
    found = [
        f"{','.join(sorted(route.methods))} {re.sub('<name:([a-z]+)>$', named, route.uri)}"
        for route in app.router.routes
    ]
    assert sorted(found) == sorted(OURS.strip().replace("\n", "  ").split("  "))
    assert app.error_handler.lookup(ValueError()) is not None
    assert len(app.response_middleware) == 1


def named(found: re.Match[str]) -> str:
    """A verb's own name, which is a pattern to Sanic."""
    return found[0] if found[1] == "str" else found[1]


class Slow:
    """An order that ends when the test says so: with an error, or well."""

    def __init__(self) -> None:
        self.ends: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, verb: str, args: dict[str, Any], _timeout: float) -> Any:
        if verb == "status":
            return {"models": {name: {"state": "serving"} for name in "abc"}}
        end = self.ends[args["model"]] = asyncio.get_running_loop().create_future()
        return await end


@pytest.mark.parametrize(
    "error", [Refused(Reason.PINNED, "pinned"), TimeoutError("late"), OSError("broken"), None]
)
@in_a_loop
async def test_all_have_been_unloaded_when_one_failure_is_told(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, slow = Desk(monkeypatch), Slow()
    desk.worker.link = slow  # type: ignore[assignment]
    task = asyncio.create_task(observation._unload(a_request(desk)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert sorted(slow.ends) == ["a", "b", "c"]
    for name, end in (("b", error), ("c", None), ("a", None)):
        assert not task.done()
        if end is None:
            slow.ends[name].set_result({})
        else:
            slow.ends[name].set_exception(end)
        for _ in range(5):
            await asyncio.sleep(0)
    if error is None:
        assert body_of(await task) == {"message": "unloaded", "models": ["a", "b", "c"]}
    else:
        with pytest.raises(type(error), match=str(error)):
            await task


@in_a_loop
async def test_nobody_is_let_in_before_the_application_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    app = build_app(desk.config, desk.dispatch, desk.page)
    told: list[tuple[str, int]] = []
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    clients = [socket.create_connection(listener.getsockname()) for listener in listeners]

    def tells(word: str) -> Any:
        async def tell(_app: Any) -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            told.append((word, desk.worker.clients))

        return tell

    for word in ("before_server_start", "after_server_start"):
        app.register_listener(tells(word), word)
    servers = await _listen(app, listeners, None)
    try:
        assert told == [("before_server_start", 0), ("after_server_start", 2)]
        assert [server.is_serving() for server in servers] == [True, True]
    finally:
        Sanic.unregister_app(app)
        for server in servers:
            server.close()
        for client in clients:
            client.close()
        while desk.worker.clients:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
