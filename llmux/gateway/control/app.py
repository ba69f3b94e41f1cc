"""The Sanic application: every route except inference. One table of routes.

Inference requests never reach it: ``llmux.gateway.client.connection`` takes them off the
connection.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from sanic import Request, Sanic
from sanic.compat import Header
from sanic.exceptions import MethodNotAllowed, SanicException
from sanic.response import BaseHTTPResponse, HTTPResponse
from sanic.response import json as json_response

from llmux.config.schema import Config
from llmux.errors import Reason, Refused
from llmux.gateway.admission.keys import may_use
from llmux.gateway.client.sanic_bridge import caller_of, request_key, request_origin
from llmux.gateway.control.context import Context, worker_of
from llmux.gateway.control.observation import add_control_routes
from llmux.gateway.control.weights import add_weights_route
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.http import openai, openapi, problems, routes
from llmux.gateway.metrics import MetricsPage

logger = logging.getLogger(__name__)


ASK_SECS = 10.0  # for verbs that only read or set; later means that the supervisor is in trouble

# (method, path below /control) → (verb, whether it may take as long as a start)
CONTROL_VERBS: Mapping[tuple[str, str], tuple[str, bool]] = {
    ("GET", "status"): ("status", False),
    ("GET", "eviction"): ("eviction_get", False),
    ("POST", "eviction"): ("eviction_set", False),
    ("POST", "mode"): ("mode", False),
    ("POST", "unpin"): ("unpin", False),
    ("POST", "pin"): ("pin", True),
    ("POST", "switch"): ("switch", True),
    ("POST", "sleep"): ("sleep", True),
    ("POST", "wake"): ("wake", True),
    ("POST", "restart"): ("restart", True),
    ("POST", "checkpoint"): ("checkpoint", True),
    ("POST", "cancel"): ("cancel", False),
}
_number = itertools.count(1)


class App(Sanic[Any, Any]):
    def add_route(self, *args: Any, **kwargs: Any) -> Any:
        """Errors are JSON, by a handler of our own. Unsaid, Sanic parses the source of each route's
        handler to guess their form, which was half of a gateway's start."""
        return super().add_route(*args, **{**kwargs, "error_format": "json"})


def build_app(config: Config, dispatch: Dispatch, metrics: MetricsPage) -> App:
    # Sanic keeps its apps in a table by name; a test process may have several gateways.
    app = App(f"llmux-gateway-{next(_number)}", configure_logging=False, strict_slashes=True)
    app.ctx.dispatch = dispatch  # for ClientConnection
    app.ctx.context = Context(dispatch.worker, metrics)
    app.config.update(
        {
            "ACCESS_LOG": False,
            # Sanic takes the least of these for its limit of a head, in all apps of a process.
            "REQUEST_MAX_SIZE": max(config.gateway.max_body_bytes, 65_536),
            "REQUEST_MAX_HEADER_SIZE": 16_384,
            "KEEP_ALIVE": True,
            # An idle timer over the handler: /control/switch is silent during a cold start.
            "RESPONSE_TIMEOUT": 24 * 3600,
            "REQUEST_TIMEOUT": 24 * 3600,  # disabled, as all of Sanic's timers
            # Rewrites methods of Sanic's classes for one app, so a second app in the same process
            # (in tests) would fail. It speeds up a path that is not hot here.
            "TOUCHUP": False,
            "FALLBACK_ERROR_FORMAT": "json",
        }
    )
    _add_routes(app)
    add_control_routes(app)
    add_weights_route(app)
    app.register_middleware(_name_request, "response")
    app.error_handler.add(Exception, _on_error)
    return app


def _add_routes(app: App) -> None:
    app.add_route(_health, "/health", methods=["GET", "HEAD"])
    app.add_route(_health, "/health/live", methods=["GET", "HEAD"], name="live")
    app.add_route(_ready, "/health/ready", methods=["GET", "HEAD"])
    app.add_route(_openapi, "/openapi.json", methods=["GET", "HEAD"])
    for prefix in ("/v1", ""):
        app.add_route(
            _models, f"{prefix}/models", methods=["GET", "HEAD"], name=f"models{prefix[1:]}"
        )
    app.add_route(_model, "/v1/models/<model:path>", methods=["GET", "HEAD"])
    for method, name in CONTROL_VERBS:
        app.add_route(
            _control, f"/control/<name:{name}>", methods=[method], name=f"{method}-{name}"
        )


# ---- handlers -----------------------------------------------------------------------------------


async def _health(_request: Request) -> HTTPResponse:
    """Liveness: the process runs and its loop turns. Says nothing about engines."""
    return json_response({"status": "ok"})


async def _ready(request: Request) -> HTTPResponse:
    """Readiness: the supervisor is connected, or a model that it granted is still held."""
    worker = worker_of(request)
    link = worker.link
    if worker.draining:
        raise Refused(Reason.SHUTTING_DOWN, "the gateway is shutting down")
    if not link.up and not worker.admission.holds():
        raise Refused(
            Reason.SUPERVISOR_UNREACHABLE,
            "the supervisor is not connected and no model is granted",
            hint="systemctl status llmux",
        )
    return json_response({"status": "ready", "supervisor": "up" if link.up else "away"})


async def _openapi(_request: Request) -> HTTPResponse:
    return json_response(openapi.document())


async def _models(request: Request) -> HTTPResponse:
    key = request_key(request)
    models = worker_of(request).models.values()
    visible = (info for info in models if may_use(key, info.name))
    return json_response(openai.model_list(visible))


async def _model(request: Request, model: str) -> HTTPResponse:
    worker = worker_of(request)
    model = unquote(model)  # clients write the "/" of a name as %2F
    name = worker.names.get(model)
    if name is None or not may_use(request_key(request), name):
        raise openai.unknown_model(model)
    return json_response(openai.model_object(worker.models[name], called=model))


async def _control(request: Request, name: str) -> HTTPResponse:
    """Pass on the verb and the supervisor's answer. A disconnect does not cancel the work."""
    verb, slow = CONTROL_VERBS[request.method, name]
    worker = worker_of(request)
    timeout = worker.startup_secs + ASK_SECS if slow else ASK_SECS
    arguments = _arguments(request)
    if isinstance(model := arguments.get("model"), str):
        arguments["model"] = worker.names.get(model, model)
    arguments["by"] = caller_of(request)
    return json_response(await worker.link.ask(verb, arguments, timeout))


def _arguments(request: Request) -> dict[str, Any]:
    if request.method != "POST" or not request.body:
        return {}
    try:
        parsed = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.BAD_REQUEST, f"cannot read the request body: {error}") from None
    if not isinstance(parsed, dict):
        raise Refused(Reason.BAD_REQUEST, "cannot read the request body: expected a JSON object")
    return parsed


# ---- errors and headers -------------------------------------------------------------------------


class _Headers(Header):
    """Drops the empty Alt-Svc that Sanic adds to every response: it is invalid (RFC 7838 3)."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name != "alt-svc":
            super().__setitem__(name, value)


async def _name_request(request: Request, response: BaseHTTPResponse) -> None:
    response.headers = _Headers(response.headers)
    request_id = request.headers.get("x-request-id")
    if request_id is not None:
        response.headers["x-request-id"] = request_id
    cors = worker_of(request).cors
    origin = request_origin(request)
    if cors is not None and origin:
        for line in cors.headers(origin).decode("latin-1").splitlines():
            name, _, value = line.partition(": ")
            response.headers[name] = value


def _on_error(request: Request, exception: Exception) -> HTTPResponse:
    problem = _problem(request, exception)
    if problem is exception:
        request_id = request.headers.get("x-request-id", "").encode("ascii", "replace")
        worker_of(request).log.refused(problem, request=request_id)
    headers: dict[str, str] = {}
    retry_after = problems.retry_after_of(problem)
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    if "allow" in problem.fields:
        headers["allow"] = problem.fields["allow"]
    status = problems.status_of(problem)
    anthropic = routes.speaks_anthropic(request.raw_url.partition(b"?")[0])
    body = problems.error_object(problem, anthropic=anthropic)
    return json_response(body, status=status, headers=headers)


def _problem(request: Request, exception: Exception) -> Refused:
    if isinstance(exception, Refused):
        return exception
    if isinstance(exception, MethodNotAllowed):
        # Sanic names none where each method has a route of its own
        named = exception.allowed_methods or openapi.methods_of(request.raw_url.partition(b"?")[0])
        allowed = ", ".join(sorted(named))
        return Refused(
            Reason.METHOD_NOT_ALLOWED,
            f"cannot {request.method} {request.path}: only {allowed or 'other methods'} allowed",
            allow=allowed,
        )
    if methods := routes.methods_of(request.raw_url.partition(b"?")[0]):
        allowed = ", ".join(methods)
        return Refused(
            Reason.METHOD_NOT_ALLOWED,
            f"cannot {request.method} {request.path}: only {allowed} is allowed",
            allow=allowed,
        )
    if isinstance(exception, SanicException) and exception.status_code == 404:
        return Refused(Reason.NOT_FOUND, f"there is no {request.method} {request.path[:200]}")
    if isinstance(exception, SanicException) and 400 <= exception.status_code < 500:
        return Refused(Reason.BAD_REQUEST, str(exception))
    logger.error(
        "internal error: %s %s", request.method, request.path, exc_info=exception,
        extra={"request": request.headers.get("x-request-id")},
    )  # fmt: skip
    return Refused(Reason.INTERNAL, "internal error (see the journal of llmux-gateway)")
