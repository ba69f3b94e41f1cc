"""Routes besides /control: /metrics, /running, /unload, /logs and /events.

The paths are those of other model swappers. Requests are authorized before they reach a handler.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import unquote

from sanic import Request, Sanic
from sanic.response import HTTPResponse, text
from sanic.response import json as json_response

from llmux.errors import Reason, Refused
from llmux.gateway.client.sanic_bridge import caller_of
from llmux.gateway.control.context import context_of, worker_of
from llmux.gateway.event_feed import read_page
from llmux.gateway.http import openai
from llmux.gateway.metrics import TIMEOUT_HEADER
from llmux.gateway.worker import Worker

ASK_SECS = 10.0
KEEP_ALIVE_SECS = 15.0  # interval of keep-alive comments, below the idle timeouts of proxies
TAIL_LINES = 100
MAX_TAIL_LINES = 10_000
MAX_DIGITS = 18

# Our states in the words of other model swappers.
_STATES = {
    "starting": "starting",
    "waking": "starting",
    "serving": "ready",
    "draining": "stopping",
    "parking": "stopping",
    "stopping": "stopping",
}


def add_control_routes(app: Sanic[Any, Any]) -> None:
    app.add_route(_metrics, "/metrics", methods=["GET", "HEAD"])
    app.add_route(_running, "/running")
    app.add_route(_unload, "/unload", methods=["GET", "POST"])
    app.add_route(_logs, "/logs")
    app.add_route(_logs, "/logs/<model:path>", name="logs-model")
    app.add_route(_log_stream, "/logs/stream/<model:path>")
    app.add_route(_events, "/events")


async def _metrics(request: Request) -> HTTPResponse:
    page = context_of(request).metrics
    headers = request.headers
    body, content_type = await page.scrape(
        headers.get("accept", ""), headers.get(TIMEOUT_HEADER, "")
    )
    return HTTPResponse(body, content_type=content_type)


async def _running(request: Request) -> HTTPResponse:
    """Models whose engine has processes, parked ones included."""
    worker = worker_of(request)
    status = await worker.link.ask("status", {}, ASK_SECS)
    running = [
        {
            "model": name,
            "name": name,
            "state": _STATES.get(model["state"], model["state"]),
            "llmux_state": model["state"],
            "proxy": model["address"] or "",
            "cmd": model["unit"] or "",
            "since_secs": model["since_secs"],
        }
        for name, model in status["models"].items()
        if model["pid"] is not None
    ]
    return json_response({"running": running})


async def _unload(request: Request) -> HTTPResponse:
    """Stop one model (``?model=`` or a JSON body) or all of them, after draining."""
    worker = worker_of(request)
    model = _asked_model(request)
    if model is None:
        status = await worker.link.ask("status", {}, ASK_SECS)
        names = [name for name, one in status["models"].items() if one["state"] != "stopped"]
    else:
        names = [worker.names.get(model, model)]
    timeout, by = worker.startup_secs + ASK_SECS, caller_of(request)
    answers = await asyncio.gather(
        *(worker.link.ask("unload", {"model": n, "by": by}, timeout) for n in names),
        return_exceptions=True,
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return json_response({"message": "unloaded", "models": names})


def _asked_model(request: Request) -> str | None:
    model = request.args.get("model")
    if request.method == "POST" and request.body:
        try:
            body = json.loads(request.body)
        except (ValueError, RecursionError) as error:
            raise Refused(Reason.BAD_REQUEST, f"cannot read the request body: {error}") from None
        model = body.get("model", model) if isinstance(body, dict) else body
    if model is not None and not isinstance(model, str):
        raise Refused(Reason.BAD_REQUEST, 'cannot unload: "model" is not a string', param="model")
    return model


# ---- engines' output ----------------------------------------------------------------------------


async def _logs(request: Request, model: str | None = None) -> HTTPResponse:
    return text("".join(f"{line}\n" for line in await _tail(request, model)))


async def _tail(request: Request, model: str | None) -> list[str]:
    worker = worker_of(request)
    name = model or request.args.get("model")
    if name is None:
        raise Refused(Reason.BAD_REQUEST, "missing model: use /logs/MODEL", param="model")
    lines = request.args.get("lines", str(TAIL_LINES))
    if not _is_number(lines) or not 0 < int(lines) <= MAX_TAIL_LINES:
        raise Refused(Reason.BAD_REQUEST, f"lines: expected 1 to {MAX_TAIL_LINES}", param="lines")
    name = _name(worker, name)
    result = await worker.link.ask("logs", {"model": name, "lines": int(lines)}, ASK_SECS)
    return list(result["lines"])


async def _log_stream(request: Request, model: str) -> None:
    """The last lines (unless ?no-history), then every line as the engine writes it."""
    worker = worker_of(request)
    model = _name(worker, model)
    with worker.subscriptions.subscribe("logs", model) as subscription:
        tail = await _tail(request, model)
        response = await request.respond(
            content_type="text/plain; charset=utf-8", headers={"x-accel-buffering": "no"}
        )
        history = [] if "no-history" in request.query_string else tail
        await response.send("".join(f"{line}\n" for line in history) or "\n")
        async for line in subscription.items(KEEP_ALIVE_SECS):
            if line is not None:
                await response.send(f"{line}\n")
        await response.eof()


def _name(worker: Worker[Any], name: str) -> str:
    """The model's own name; clients write the "/" of a name as %2F. Raises Refused for an unknown
    one, before anything is subscribed to or sent to the supervisor."""
    known = worker.names.get(unquote(name))
    if known is None:
        raise openai.unknown_model(unquote(name))
    return known


def _is_number(text: str) -> bool:
    """Longer ones are refused by int() itself, with an exception."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


# ---- events -------------------------------------------------------------------------------------


async def _events(request: Request) -> None:
    """Server-sent events. Last-Event-ID replays the events missed, as far as they are kept."""
    worker = worker_of(request)
    with worker.subscriptions.subscribe("events") as subscription:
        missed = await _missed(request)
        response = await request.respond(
            content_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        await response.send(": llmux\n\n")
        for event in missed:
            await response.send(_sse(event))
        twice = {event["id"] for event in missed}  # published as well while we asked
        async for event in subscription.items(KEEP_ALIVE_SECS):
            if event is None:
                await response.send(": still here\n\n")
            elif event["id"] in twice:
                twice.discard(event["id"])
            else:
                await response.send(_sse(event))
        await response.eof()


async def _missed(request: Request) -> list[dict[str, Any]]:
    seen = request.headers.get("last-event-id", "")
    if not _is_number(seen):
        return []
    worker = worker_of(request)
    return await events_after(worker, int(seen))


async def events_after(
    worker: Worker[Any], seen: int, *, queues: bool = False
) -> list[dict[str, Any]]:
    """All events kept that are newer than number ``seen``; a message holds a part of them."""
    events: list[dict[str, Any]] = []
    more = True
    while more:
        asked = {"after": seen, "queues": queues}
        page, more = read_page(await worker.link.ask("events", asked, ASK_SECS))
        # A supervisor of an earlier version answers the newest, whatever is asked.
        newer = [event for event in page if event["id"] > seen]
        events += newer
        more = more and bool(newer)
        seen = events[-1]["id"] if events else seen
    return events


def _sse(event: dict[str, Any]) -> str:
    return f"id: {event['id']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n"
