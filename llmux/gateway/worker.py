"""What one gateway worker is: its configuration and state, without behaviour.

One instance per worker, used from one event loop. ``dispatch`` acts on requests, ``supervisor`` on
the supervisor's messages; both change it, everything else reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic

from llmux.config.schema import Config
from llmux.gateway.admission.admission import Admission
from llmux.gateway.admission.key_limits import share
from llmux.gateway.admission.keys import Guard, LoadKeys
from llmux.gateway.admission.queue import T
from llmux.gateway.admission.retry_after import Switches
from llmux.gateway.client.turns import Turns
from llmux.gateway.exchange.loading_text import Standing
from llmux.gateway.http.budget import BodyBudget
from llmux.gateway.http.cors import Cors
from llmux.gateway.http.hosts import Hosts
from llmux.gateway.http.openai import names_of
from llmux.gateway.journal import RequestLog
from llmux.gateway.link import Link
from llmux.gateway.observer import Observer
from llmux.gateway.subscriptions import Subscriptions
from llmux.protocol import ModelInfo
from llmux.responses import ResponseModels


class Worker(Generic[T]):
    """``T`` is the class of the tickets in ``admission``, which knows nothing of HTTP.

    ``draining``: the worker is stopping; responses that begin now close their connection.
    ``closing``: no successor accepts; connections are closed after their current response.
    ``supervisor_lost``: the supervisor is away for longer than a restart, so no request may wait.
    """

    def __init__(
        self, config: Config, link: Link, *, name: str, keys: LoadKeys | None = None
    ) -> None:
        settings = config.gateway
        self.name = name  # at the supervisor
        self.config = config
        self.link = link
        self.clock: Callable[[], float] = asyncio.get_running_loop().time
        self.max_body_bytes = settings.max_body_bytes
        self.max_connections = share(settings.max_connections, settings.workers)
        self.bodies = BodyBudget(share(settings.max_buffered_bytes, settings.workers))
        self.turns = Turns()
        self.keep_alive_secs = settings.keep_alive_comment_secs
        self.startup_secs = config.startup_timeout_secs
        self.draining = self.closing = self.supervisor_lost = False
        self.clients = 0  # open connections
        self.client_came = asyncio.Event()  # set whenever a client's connection begins
        self.client_left = asyncio.Event()  # set whenever one ends
        self.models: dict[str, ModelInfo] = {
            name: ModelInfo(
                name=name,
                state="unknown",
                aliases=list(model.aliases),
                adapters=list(model.adapters),
            )
            for name, model in config.models.items()
        }
        self.names = names_of(self.models.values())  # name or alias → model
        self.fallback = settings.fallback_model
        self.responses = ResponseModels()
        self.hosts = Hosts(("*",) if settings.allow_public_without_keys else settings.allowed_hosts)
        self.cors = Cors(settings.cors_origins) if settings.cors_origins else None
        self.guard = (
            None if keys is None else Guard(keys, workers=settings.workers, clock=self.clock)
        )
        self.observer = Observer(known=self.models)
        self.log = RequestLog(self.clock, self.models)
        self.admission: Admission[T] = Admission(
            clock=self.clock,
            max_waiting=share(settings.max_waiting, settings.workers),
            wait_secs=config.policy.request_timeout_secs,
            models=self.models,
            alone=1 if settings.workers == 1 else 2,
            on_change=link.demand_changed,
            max_in_flight=share(settings.max_in_flight, settings.workers),
        )
        self.switches = Switches(self.clock, min_active_secs=config.policy.min_active_secs)
        self.standing = (
            Standing(link, self.admission, self.switches, self.clock)
            if settings.loading_text
            else None
        )
        self.subscriptions = Subscriptions(link)
        if self.guard is not None:
            self.guard.know(self.names)

    def model_of(self, name: str) -> str | None:
        """The model that answers to the name: its own, an alias, or else the fallback. None when
        there is neither."""
        return self.names.get(name, self.fallback)
