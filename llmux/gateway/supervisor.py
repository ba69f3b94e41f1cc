"""The effects of the supervisor's messages on a worker, and of the supervisor's absence.

While the supervisor is away for longer than a restart takes, no model can be woken: a request that
would have to wait is refused at once. Models that were granted are served all the while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import starmap
from typing import Any, Final

from llmux.errors import Reason, Refused
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.http.openai import names_of
from llmux.gateway.http.problems import reason_of, supervisor_lost
from llmux.protocol import (
    Catalog,
    Collect,
    Collected,
    Cut,
    Drained,
    Grant,
    Hello,
    Message,
    News,
    Progress,
    Refuse,
    ResponseOwners,
    Revoke,
)

logger = logging.getLogger(__name__)

AWAY_SECS: Final = 30.0  # a restart takes a second, with many engines to look at a few


class Supervisor:
    """Attaches itself to the worker's link. ``snapshot`` returns the worker's own metrics."""

    def __init__(self, dispatch: Dispatch, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._dispatch = dispatch
        self._worker = dispatch.worker
        self._admission = dispatch.worker.admission
        self._snapshot = snapshot
        dispatch.worker.link.attach(
            greetings=self._greetings,
            hello=self._hello,
            demand=self._admission.demand,
            active=self._active_models,
            on_message=self.on_message,
        )

    # ---- after every connect --------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(role="gateway", worker=self._worker.name, holds=self._admission.holds())

    def _greetings(self) -> list[Message]:
        worker = self._worker
        stored = starmap(ResponseOwners, worker.responses.parts())
        return [*worker.subscriptions.greetings(), *stored]

    def _active_models(self) -> list[str]:
        """Models with anything to report: waiting requests, requests in flight, or counters."""
        return [queue.model for queue in self._admission.queues()]

    # ---- messages -------------------------------------------------------------------------------

    def on_message(self, message: Message) -> None:
        match message:
            case Grant():
                self._grant(message)
            case Revoke():
                self._revoke(message)
            case Cut():
                self._cut(message)
            case Refuse():
                refusal = Refused(
                    reason_of(message.code), message.message, retry_after=message.retry_after
                )
                waiting = self._admission.refuse(message.model)
                self._dispatch.refuse_all(waiting, lambda _model: refusal)
            case Catalog():
                self._take_catalog(message)
            case News():
                self._worker.subscriptions.publish(message)
            case Collect():
                self._worker.link.send(Collected(message.id, self._snapshot()))
            case Progress():
                pass  # of a long order; the page and `llmux ps` show it from the status
            case _:
                logger.warning("ignoring a message of unexpected type: %s", message.kind)

    def _grant(self, message: Grant) -> None:
        admitted = self._admission.grant(message.model, message.epoch, message.address)
        if (held := self._admission.held(message.model)) is not None:
            self._dispatch.pool(held).reopen()
        switch = self._worker.switches.granted(message.model)
        for exchange in admitted:
            exchange.switch = switch
        self._dispatch.send_admitted(admitted)

    def _revoke(self, message: Revoke) -> None:
        lease = self._admission.revoke(message.model, message.epoch)
        if lease is None:
            self._worker.link.send(Drained(message.model, message.epoch))
            return
        self._dispatch.pool(lease).close()
        if not message.dead:
            return
        problem = Refused(Reason.ENGINE_DIED, f'the engine of model "{message.model}" died')
        for exchange in list(lease.in_flight):
            between_chunks = exchange.between_chunks
            self._dispatch.retry_or_fail(
                exchange, problem, between_chunks=between_chunks, begun=True
            )

    def _cut(self, message: Cut) -> None:
        """What an engine hangs on is not repeated, only what it never began."""
        problem = Refused(reason_of(message.code), message.message)
        hangs = problem.reason is Reason.ENGINE_DIED
        for exchange in self._admission.in_flight_on(message.model, message.epoch):
            if hangs and self._never_begun(exchange):
                between = exchange.between_chunks
                self._dispatch.retry_or_fail(exchange, problem, between_chunks=between, begun=False)
            else:
                exchange.refuse(problem)

    @staticmethod
    def _never_begun(exchange: Exchange) -> bool:
        connection = exchange.connection
        if connection is None:  # still to be accepted, or its whole answer is a 500 that is held
            return not exchange.holds
        return connection.unread

    def _take_catalog(self, catalog: Catalog) -> None:
        worker = self._worker
        models = {info.name: info for info in catalog.infos()}
        worker.models = worker.observer.known = worker.log.known = models
        worker.names = names_of(models.values())
        if worker.guard is not None:
            worker.guard.know(worker.names)
        worker.switches.see(models.values())
        self._take_times(catalog.times)
        self._admission.set_models(models)

    def _take_times(self, times: Mapping[str, float]) -> None:
        """A reload may have changed them; waiting requests keep their deadlines."""
        admission, worker = self._admission, self._worker
        admission.wait_secs = times.get("request_timeout_secs", admission.wait_secs)
        worker.startup_secs = times.get("startup_timeout_secs", worker.startup_secs)
        switches = worker.switches
        switches.min_active_secs = times.get("min_active_secs", switches.min_active_secs)

    # ---- absence --------------------------------------------------------------------------------

    async def watch(self, away_secs: float) -> None:
        """Keep ``supervisor_lost`` up to date. Runs until cancelled."""
        worker = self._worker
        while True:
            await worker.link.gone_for(away_secs)
            logger.warning(
                "the supervisor has been away for %g s: until it is back only resident models are"
                " served; next step: systemctl status llmux",
                away_secs,
            )
            worker.supervisor_lost = True
            for model in self._admission.wanted():
                self._dispatch.refuse_all(self._admission.refuse(model), supervisor_lost)
            await worker.link.here.wait()
            worker.supervisor_lost = False
            logger.info("the supervisor is back")
