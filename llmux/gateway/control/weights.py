"""GET /health/weights: how well each model is served here, for a proxy in front of several servers.

A proxy asks every second or so. What is answered is the worker's own catalog, without the
supervisor or an engine. With keys, a key sees only the models that it may use.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from sanic import Request, Sanic
from sanic.response import HTTPResponse, text
from sanic.response import json as json_response

from llmux.gateway.admission.keys import may_use
from llmux.gateway.client.sanic_bridge import request_key
from llmux.gateway.control.context import worker_of
from llmux.gateway.worker import Worker
from llmux.protocol import ModelInfo

# A request finds the model there from AWAKE on, and finds it soon from COMING on. Below that the
# server would have to make room first, and at 0 it cannot have the model now.
AWAKE: Final = 100
COMING: Final = 50
WEIGHTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "serving": AWAKE,
        "waking": COMING + 10,
        "starting": COMING,
        "draining": 10,
        "parking": 10,
        "parked": 10,
        "stopping": 1,
        "stopped": 1,
        "failed": 0,
    }
)
UNKNOWN: Final = 1  # no supervisor has said a state yet


def add_weights_route(app: Sanic[Any, Any]) -> None:
    app.add_route(_weights, "/health/weights", methods=["GET", "HEAD"])


async def _weights(request: Request) -> HTTPResponse:
    """JSON, or with ``Accept: text/plain`` a line for each model: its weight, a space, its name and
    its aliases, with tabs between them."""
    worker = worker_of(request)
    key = request_key(request)
    visible = [info for info in worker.models.values() if may_use(key, info.name)]
    if request.headers.get("accept") == "text/plain":
        lines = [
            f"{weight(worker, info)} " + "\t".join([info.name, *info.aliases]) for info in visible
        ]
        return text("".join(f"{line}\n" for line in lines))
    models = {
        info.name: {"weight": weight(worker, info), "state": info.state, "aliases": info.aliases}
        for info in visible
    }
    return json_response({"models": models})


def weight(worker: Worker[Any], info: ModelInfo) -> int:
    number = WEIGHTS.get(info.state, UNKNOWN)
    if worker.supervisor_lost and number < AWAKE:  # no supervisor, and so nothing that wakes it
        return 0
    return number
