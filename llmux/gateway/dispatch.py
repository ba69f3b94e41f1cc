"""Dispatch: from a request to an exchange, from an exchange to a lease, and on an engine's failure.

Everything runs in one event loop and every method is called from it. Decides nothing that admission
or the supervisor decides. Never awaits on a request's path.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable
from typing import Final, TypeGuard

from llmux.config.choices import KeyRole
from llmux.errors import Reason, Refused
from llmux.gateway.admission.key_limits import KeyUse
from llmux.gateway.admission.keys import begin_use
from llmux.gateway.admission.queue import Lease, Stage
from llmux.gateway.engine.connection import EngineFailure
from llmux.gateway.engine.health import HealthQuestion
from llmux.gateway.engine.pool import EnginePool
from llmux.gateway.exchange.exchange import Client, Exchange
from llmux.gateway.http.problems import supervisor_lost
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.routes import JSON, Match
from llmux.gateway.worker import Worker
from llmux.protocol import Drained, EngineLost, KeepAliveHint, ResponseOwners

FULL: Final = frozenset({Reason.OVERLOADED, Reason.QUEUE_FULL, Reason.RATE_LIMITED})
OWNER_SECS: Final = 5.0  # for the supervisor's answer to which model owns a response
REPORT_SECS: Final = 0.1  # a dying engine breaks all its streams at once; one report is enough


def _no_response(response_id: str | None) -> Refused:
    return Refused(Reason.NOT_FOUND, f'there is no response "{response_id}" here', param="id")


def _failed(model: str, failure: EngineFailure) -> Refused:
    return Refused(failure.reason, f'cannot get an answer from model "{model}": {failure.error}')


def _is_limited(key: KeyUse | None) -> TypeGuard[KeyUse]:
    return key is not None and key.key.role is not KeyRole.ADMIN


def _check_owner(response_id: str | None, owner: str, key: KeyUse | None) -> None:
    """A response is there for the key that made it, and for administrators. Raises Refused."""
    if _is_limited(key) and key.key.name != owner:
        raise _no_response(response_id)


class Dispatch:
    """Owns the pools (one per lease) and admission's timer."""

    def __init__(self, worker: Worker[Exchange]) -> None:
        self.worker = worker
        self._admission = worker.admission
        self._loop = asyncio.get_running_loop()
        self._searches: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0  # uvloop's handle of a timer that is due at once has no time
        worker.admission.on_idle = self._on_idle
        worker.admission.on_room = self.send_admitted

    # ---- requests -------------------------------------------------------------------------------

    def exchange(self, client: Client, incoming: Incoming, match: Match) -> Exchange:
        """Create the exchange for a complete request. Raises Refused."""
        worker = self.worker
        if match.model is None and match.route.source is JSON:  # the common case first
            name, stream, _ = incoming.json()
            model = worker.names.get(name, worker.fallback) or name
        else:
            name, model = self._names(incoming, match)
            stream = incoming.wants_stream()
        alias = None
        if model != name:
            if not self._is_adapter(name, model):  # the engine knows adapters by name
                alias = name
                incoming.replace_alias(alias, model)
            elif match.model == name:
                incoming.write_adapter(name)
        exchange = Exchange(
            worker, self, client, incoming, match.route, model, alias=alias, stream=stream
        )
        if match.response_id is not None or incoming.key is not None:
            exchange.sought = self._check_response(incoming, match)
        return exchange

    def _names(self, incoming: Incoming, match: Match) -> tuple[str, str]:
        """Returns (the client's name of the model, the model). Raises Refused."""
        worker = self.worker
        name = incoming.model()
        if name is None:  # "" is replaced by _find_response_owner
            name = worker.responses.model_of(match.response_id) or ""
        # a path names its model; only what the body says may mean the fallback
        by_path = match.model is not None or not name
        model = worker.names.get(name, None if by_path else worker.fallback) or name
        # the path decides; the body may use another name of the model, never of an adapter
        if match.model is not None and not self._is_adapter(name, model):
            in_body = incoming.name_in_body()
            name = in_body if in_body and worker.names.get(in_body) == model else name
        return name, model

    def _is_adapter(self, name: str, model: str) -> bool:
        info = self.worker.models.get(model)
        return info is not None and name in info.adapters

    def _check_response(self, incoming: Incoming, match: Match) -> str | None:
        """Returns the id of a stored response that the supervisor must be asked for. Raises Refused
        when it is another key's."""
        responses = self.worker.responses
        response_id = match.response_id
        if _is_limited(incoming.key):
            response_id = incoming.named_response()
        if response_id is None or responses.model_of(response_id) is None:
            return response_id
        _check_owner(response_id, responses.key_of(response_id), incoming.key)
        return None

    def response_stored(self, response_id: str, model: str, key: KeyUse | None) -> None:
        models = {response_id: model}
        keys = {} if key is None else {response_id: key.key.name}
        self.worker.responses.keep(models, keys)
        self.worker.link.send(ResponseOwners(models, keys))

    def submit(self, exchange: Exchange) -> None:
        """Send the exchange to its engine, or queue it, or refuse it."""
        if exchange.sought is not None:
            task = self._loop.create_task(self._find_response_owner(exchange))
            self._searches.add(task)
            task.add_done_callback(self._searches.discard)
            return
        worker, model = self.worker, exchange.model
        try:
            if exchange.key is not None:
                begin_use(exchange.key, model)
                exchange.counted = True
            if worker.supervisor_lost and model in worker.models and not self._serves(model):
                raise supervisor_lost(model)
            lease = self._admission.submit(exchange)
            if lease is None and exchange.key is not None:
                exchange.key.wait()
                exchange.queued = True
        except Refused as problem:
            if problem.retry_after is None and problem.reason in FULL:
                problem.retry_after = self.secs_until(model)
            exchange.refuse(problem)
            return
        if exchange.keep_alive_secs is not None:
            seconds = exchange.keep_alive_secs
            worker.link.send(KeepAliveHint(model, None if seconds == math.inf else seconds))
        if lease is None:
            self._set_timer()
            exchange.wait_begins()
        else:
            exchange.admitted(lease.pool or self.pool(lease))

    async def _find_response_owner(self, exchange: Exchange) -> None:
        """Ask the supervisor which model owns this response id (served by another or an earlier
        worker)."""
        worker = self.worker
        response_id = exchange.sought or ""
        try:
            answer = await worker.link.ask("response", {"id": response_id}, OWNER_SECS)
            if (model := answer.get("model")) is None:
                raise _no_response(response_id)
            owner = str(answer.get("key") or "")
            _check_owner(response_id, owner, exchange.key)
        except Refused as problem:
            exchange.refuse(problem)
            return
        if exchange.stage is Stage.NEW:  # the client may have disconnected meanwhile
            worker.responses.keep({response_id: model}, {response_id: owner})
            exchange.model = exchange.model or model
            exchange.sought = None
            self.submit(exchange)

    def send_admitted(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            # An exchange sent earlier in this loop may have failed and taken this one along.
            if exchange.lease is not None and exchange.in_flight:
                if exchange.queued and exchange.key is not None:
                    exchange.queued = False
                    exchange.key.served()
                exchange.admitted(self.pool(exchange.lease))
        self._set_timer()  # they may be on trial, and others wait for its end

    # ---- failures -------------------------------------------------------------------------------

    def engine_failed(self, exchange: Exchange, failure: EngineFailure) -> None:
        """The engine broke or refused the connection that ``exchange`` was on, or its answer is
        malformed."""
        problem = _failed(exchange.model, failure)
        if failure.malformed:
            # It lives and has begun this request: the others are well, and a repetition is in vain.
            self._end(exchange, problem, between_chunks=failure.between_chunks)
            return
        lease: Lease[Exchange] | None = exchange.lease
        if lease is not None:
            # Broken mid-response: its other requests may be well. Not even begun: send no others.
            news = self._admission.suspect(lease) if exchange.repeatable else not lease.revoked
            now = self.worker.clock()
            if news and now >= lease.reported_at + REPORT_SECS:
                lease.reported_at = now
                self.worker.link.send(EngineLost(lease.model, lease.epoch, failure.error))
            self._set_timer()
        self.retry_or_fail(
            exchange,
            problem,
            between_chunks=failure.between_chunks,
            begun=failure.connected,
        )

    def engine_erred(self, exchange: Exchange) -> None:
        """The engine answered 500: the answer of one that lives, the last word of one that dies."""
        lease: Lease[Exchange] | None = exchange.lease
        assert lease is not None, "an exchange with an answer is in flight"
        HealthQuestion(self.pool(lease), functools.partial(self._judged, exchange, lease))

    def _judged(
        self, exchange: Exchange, lease: Lease[Exchange], failure: EngineFailure | None
    ) -> None:
        if exchange.lease is not lease or not exchange.holds:
            return  # its client has left, or it was cut
        if failure is None:
            exchange.pass_on()
            exchange.response_end()
        else:
            self.engine_failed(exchange, failure)

    def retry_or_fail(
        self, exchange: Exchange, problem: Refused, *, between_chunks: bool, begun: bool
    ) -> None:
        """Queue the exchange again if no byte of its response was sent, else end it. ``begun``: its
        engine may have died of it."""
        worker = self.worker
        exchange.drop_connection()
        if not worker.supervisor_lost and self._admission.wait_again(exchange, begun=begun):
            worker.observer.retried[exchange.model] += 1
            if exchange.key is not None:
                exchange.key.wait_again()
                exchange.queued = True
            worker.log.again(problem, request=exchange.request_id, model=exchange.model)
            self._set_timer()
            self.send_admitted(self._admission.admit_waiting(exchange.model))
        else:
            if exchange.repeatable and exchange.deaths > 1:
                # The engine may live: it closed the connection.
                problem.hint = (
                    f"{exchange.deaths} times the engine died with this request or broke off:"
                    " it is not repeated"
                )
            self._end(exchange, problem, between_chunks=between_chunks)

    @staticmethod
    def _end(exchange: Exchange, problem: Refused, *, between_chunks: bool) -> None:
        if exchange.repeatable:
            exchange.refuse(problem)
        else:
            exchange.break_off(problem, between_chunks=between_chunks)

    def refuse_all(self, exchanges: list[Exchange], problem: Callable[[str], Refused]) -> None:
        for exchange in exchanges:
            exchange.refuse(problem(exchange.model))

    def stop_queueing(self) -> None:
        """Refuse every waiting request, and from now on every request that would have to wait."""
        self.refuse_stopping(self._admission.close())

    def refuse_stopping(self, exchanges: list[Exchange], retry_after: float | None = None) -> None:
        self.refuse_all(exchanges, lambda model: Refused(
            Reason.SHUTTING_DOWN,
            f'cannot wait for model "{model}": the gateway is shutting down',
            retry_after=self.secs_until(model) if retry_after is None else retry_after,
        ))  # fmt: skip

    # ---- leases and their connections -----------------------------------------------------------

    def pool(self, lease: Lease[Exchange]) -> EnginePool:
        pool: EnginePool | None = lease.pool
        if pool is None:
            pool = lease.pool = EnginePool(lease.address, lambda: self._check_drained(lease))
        return pool

    def _on_idle(self, lease: Lease[Exchange]) -> None:
        self.pool(lease).close()  # calls _check_drained, now or when the last connection is gone

    def _check_drained(self, lease: Lease[Exchange]) -> None:
        if self.pool(lease).empty and self._admission.forget(lease):
            self.worker.link.send(Drained(lease.model, lease.epoch))

    # ---- time -----------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        due = self._admission.wake_at
        if due is None:
            return
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        expired, admitted = self._admission.tick()
        self.refuse_all(expired, self._wait_expired)
        self.send_admitted(admitted)
        self._set_timer()

    def _wait_expired(self, model: str) -> Refused:
        what = "had no place free" if self._serves(model) else "could not be made ready"
        return Refused(
            Reason.WAIT_EXPIRED,
            f'model "{model}" {what} in time',
            hint="the limit is policy.request_timeout_secs or the client's own timeout",
            retry_after=self.secs_until(model),
        )

    def secs_until(self, model: str) -> float:
        """For Retry-After: estimated seconds until a request refused now would be answered.

        Rounded to the nearest second, not up: the estimate is no bound.
        """
        serves = self._serves(model)
        coming = 0.0 if serves else self.secs_coming(model)
        place = self._admission.secs_to_place(model, coming)
        if place is not None:
            return round(place)
        return 1.0 if serves else round(coming)  # 1: no throughput was measured yet

    def _serves(self, model: str) -> bool:
        return self._admission.usable(model)

    def secs_coming(self, model: str) -> float:
        """Estimated seconds until the model serves."""
        return self.worker.switches.secs_until(model, self._admission.wanted())

    # ---- stopping -------------------------------------------------------------------------------

    def close(self) -> None:
        """Cut the remaining requests and close all connections to engines."""
        if self._timer is not None:
            self._timer.cancel()
        self.worker.draining = self.worker.closing = True
        self.worker.subscriptions.close()
        self.stop_queueing()  # no waiting request may take the places that become free below
        problem = Refused(Reason.SHUTTING_DOWN, "the gateway is shutting down")
        for queue in list(self._admission.queues()):
            for lease in list(queue.leases.values()):
                for exchange in list(lease.in_flight):
                    exchange.refuse(problem)
                self.pool(lease).close()
