"""What a handler of the Sanic application needs from the worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sanic import Request

from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.metrics import MetricsPage
from llmux.gateway.worker import Worker


@dataclass(frozen=True, slots=True)
class Context:
    worker: Worker[Exchange]
    metrics: MetricsPage


def context_of(request: Request) -> Context:
    context: Context = request.app.ctx.context
    return context


def worker_of(request: Request) -> Worker[Any]:
    return context_of(request).worker
