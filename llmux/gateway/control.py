"""Observation and orders besides /control: /metrics, /running, /unload, /logs and /events.

Paths are those that users of other swappers know. Who may use them is decided before, in front.py.
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
from llmux.gateway.gateway import Gateway
from llmux.gateway.metrics import CONTENT_TYPE

ASK_SECS = 10.0
KEEP_ALIVE_SECS = 15.0  # a comment this often, so that nobody in between takes us for dead
TAIL_LINES = 100
MAX_TAIL_LINES = 10_000

# Others' words for our states.
_WORDS = {
    "starting": "starting",
    "waking": "starting",
    "serving": "ready",
    "draining": "stopping",
    "parking": "stopping",
    "stopping": "stopping",
}


def add_control_routes(app: Sanic[Any, Any]) -> None:
    app.add_route(_metrics, "/metrics", methods=["GET", "HEAD"], name="metrics")
    app.add_route(_running, "/running", methods=["GET"], name="running")
    app.add_route(_unload, "/unload", methods=["GET", "POST"], name="unload")
    app.add_route(_logs, "/logs", methods=["GET"], name="logs")
    app.add_route(_logs, "/logs/<model:path>", methods=["GET"], name="logs-model")
    app.add_route(_log_stream, "/logs/stream/<model:path>", methods=["GET"], name="logs-stream")
    app.add_route(_events, "/events", methods=["GET"], name="events")


async def _metrics(request: Request) -> HTTPResponse:
    gateway: Gateway = request.app.ctx.gateway
    return text(await gateway.exposition.text(), headers={"content-type": CONTENT_TYPE})


async def _running(request: Request) -> HTTPResponse:
    """Models whose engine has processes, parked ones included."""
    gateway: Gateway = request.app.ctx.gateway
    status = await gateway.link.ask("status", {}, ASK_SECS)
    running = [
        {
            "model": name,
            "name": name,
            "state": _WORDS.get(model["state"], model["state"]),
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
    """Stop one model (``?model=`` or a JSON body) or all of them; what runs on them is drained."""
    gateway: Gateway = request.app.ctx.gateway
    model = _asked_model(request)
    if model is None:
        status = await gateway.link.ask("status", {}, ASK_SECS)
        names = [name for name, one in status["models"].items() if one["state"] != "stopped"]
    else:
        names = [gateway.find_model(model) or model]
    patience = gateway.startup_secs + ASK_SECS
    answers = await asyncio.gather(
        *(gateway.link.ask("unload", {"model": name}, patience) for name in names),
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
    gateway: Gateway = request.app.ctx.gateway
    name = model or request.args.get("model")
    if name is None:
        raise Refused(Reason.BAD_REQUEST, "whose lines? say /logs/MODEL", param="model")
    lines = request.args.get("lines", str(TAIL_LINES))
    if not (lines.isascii() and lines.isdigit()) or not 0 < int(lines) <= MAX_TAIL_LINES:
        raise Refused(Reason.BAD_REQUEST, f"lines: expected 1 to {MAX_TAIL_LINES}", param="lines")
    name = _name(gateway, name)
    result = await gateway.link.ask("logs", {"model": name, "lines": int(lines)}, ASK_SECS)
    return list(result["lines"])


async def _log_stream(request: Request, model: str) -> None:
    """The last lines (not with ?no-history), then every line as the engine writes it."""
    gateway: Gateway = request.app.ctx.gateway
    model = _name(gateway, model)
    with gateway.feeds.subscribe("logs", model) as subscription:
        tail = await _tail(request, model)  # says as well if there is no such model
        response = await request.respond(
            content_type="text/plain; charset=utf-8", headers={"x-accel-buffering": "no"}
        )
        history = [] if "no-history" in request.query_string else tail
        await response.send("".join(f"{line}\n" for line in history) or "\n")
        async for line in subscription.items(KEEP_ALIVE_SECS):
            if line is not None:
                await response.send(f"{line}\n")
        await response.eof()


def _name(gateway: Gateway, asked: str) -> str:
    """The model's own name; clients write the "/" of one as %2F."""
    return gateway.find_model(unquote(asked)) or asked


# ---- events -------------------------------------------------------------------------------------


async def _events(request: Request) -> None:
    """Server-sent events; one that comes back with Last-Event-ID gets what it missed, if that is
    still known."""
    gateway: Gateway = request.app.ctx.gateway
    with gateway.feeds.subscribe("events") as subscription:
        missed = await _missed(request)
        response = await request.respond(
            content_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        await response.send(": llmux\n\n")
        for event in missed:
            await response.send(_sse(event))
        twice = {event["id"] for event in missed}  # were announced as well, while we asked
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
    if not (seen.isascii() and seen.isdigit()):
        return []
    gateway: Gateway = request.app.ctx.gateway
    known = (await gateway.link.ask("events", {}, ASK_SECS))["events"]
    return [event for event in known if event["id"] > int(seen)]


def _sse(event: dict[str, Any]) -> str:
    return f"id: {event['id']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n"
