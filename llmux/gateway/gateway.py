"""One gateway worker: the one place where the supervisor's messages, admission, engines and
clients meet. Everything runs in one event loop and every method here is called from it.

Holds the worker's state (``admission``, one pool per lease); decides nothing that admission or the
supervisor decides. Never awaits on a request's path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llmux.config.schema import Config
from llmux.errors import Reason, Refused
from llmux.gateway import openai, problems
from llmux.gateway.absence import nobody_wakes
from llmux.gateway.admission import Admission
from llmux.gateway.control_feeds import Feeds
from llmux.gateway.cors import Cors
from llmux.gateway.estimate import Switches
from llmux.gateway.incoming import Incoming
from llmux.gateway.journal import RequestLog
from llmux.gateway.keys import Guard, LoadKeys, begin_use
from llmux.gateway.limits import share
from llmux.gateway.link import Link
from llmux.gateway.metrics import Exposition
from llmux.gateway.observer import Observer
from llmux.gateway.openai import names_of
from llmux.gateway.patience import PatientExchange, wants_stream
from llmux.gateway.pool import EnginePool
from llmux.gateway.relay import Exchange, KeptExchange
from llmux.gateway.routes import Match, Source
from llmux.gateway.stopping import turn_away
from llmux.gateway.tickets import Lease, Stage, Ticket
from llmux.gateway.upstream import EngineFailure
from llmux.protocol import (
    Catalog,
    Collect,
    Collected,
    Cut,
    Drained,
    EngineLost,
    Grant,
    Hello,
    Kept,
    Message,
    ModelInfo,
    News,
    Refuse,
    Revoke,
)
from llmux.responses import ResponseModels

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol

logger = logging.getLogger(__name__)

FULL = frozenset({Reason.OVERLOADED, Reason.QUEUE_FULL, Reason.RATE_LIMITED})
SEEK_SECS = 5.0  # for the supervisor to say whose response it is
REPORT_SECS = 0.1  # a dying engine breaks all its streams at once; one report is enough


class Gateway:
    """``draining``: the worker is stopping; connections are closed after their present answer.
    ``alone``: the supervisor is away for so long that nobody may wait for a model."""

    def __init__(
        self, config: Config, link: Link, *, worker: str, keys: LoadKeys | None = None
    ) -> None:
        self.config = config
        self.max_body_bytes = config.gateway.max_body_bytes
        origins = config.gateway.cors_origins
        self._comments = config.gateway.keep_alive_comment_secs > 0
        self.cors = Cors(origins) if origins else None
        self.observer = Observer()
        self.draining = self.alone = False
        self.clients = 0  # connections open
        self.client_left = asyncio.Event()  # set whenever a client's connection ends
        self.models: dict[str, ModelInfo] = {
            name: ModelInfo(name=name, state="unknown", aliases=list(model.aliases))
            for name, model in config.models.items()
        }
        self._names: dict[str, str] = {}
        self.responses = ResponseModels()
        self._seeking: set[asyncio.Task[None]] = set()
        self._worker = worker
        self.link = link
        self._loop = asyncio.get_running_loop()
        self.clock: Callable[[], float] = self._loop.time
        workers = config.gateway.workers
        self.guard = None if keys is None else Guard(keys, workers=workers, clock=self.clock)
        self._know(names_of(self.models.values()))
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0  # uvloop gives what is due at once no time of its own
        self.admission = Admission(
            clock=self.clock,
            max_waiting=share(config.gateway.max_waiting, workers),
            wait_secs=config.policy.request_timeout_secs,
            models=self.models,
            on_change=link.demand_changed,
            on_idle=self._on_idle,
            on_room=self._send_admitted,
            max_in_flight=share(config.gateway.max_in_flight, workers),
        )
        self._switches = Switches(self.clock, min_active_secs=config.policy.min_active_secs)
        self.startup_secs = config.startup_timeout_secs
        self.feeds = Feeds(link)
        self.exposition = Exposition(self, worker)
        self.observer.known = self.models
        self.log = RequestLog(self.clock, self.models)
        link.attach(
            greetings=self._greetings,
            hello=self._hello,
            demand=self.admission.demand,
            active=self._active_models,
            on_message=self.on_message,
        )

    # ---- requests -------------------------------------------------------------------------------

    def find_model(self, name: str) -> str | None:
        """The model of that name or alias."""
        return self._names.get(name)

    def exchange(self, front: FrontProtocol, incoming: Incoming, match: Match) -> Exchange:
        """For a request that is whole. Raises Refused."""
        if match.route.source is Source.JSON and match.model is None:  # the common case first
            name: str | None = openai.model_of(incoming.body)
        else:
            name = incoming.model()
        if name is None:  # "" is filled in by _seek
            name = self.responses.model_of(match.response_id) or ""
        model = self._names.get(name, name)
        if match.model is not None:  # says whose it is; the body may say another of its names
            called = incoming.name_in_body()
            name = called if called and self._names.get(called) == model else name
        alias = None if model == name else name
        if alias is not None:
            incoming.call_model(alias, model)
        kind = KeptExchange if match.route.keeps else Exchange
        if self._comments and wants_stream(incoming):
            kind = PatientExchange
        return kind(self, front, incoming, model, alias=alias)

    def keeps_response(self, response_id: str, model: str) -> None:
        self.responses.keep({response_id: model})
        self.link.send(Kept({response_id: model}))

    def submit(self, exchange: Exchange) -> None:
        if not exchange.model:
            task = self._loop.create_task(self._seek(exchange))
            self._seeking.add(task)
            task.add_done_callback(self._seeking.discard)
            return
        try:
            if exchange.key is not None:
                begin_use(exchange.key, exchange.model)
                exchange.counted = True
            if self.alone and exchange.model in self.models and not self._serves(exchange.model):
                raise nobody_wakes(exchange.model)
            lease = self.admission.submit(exchange)
            if lease is None and exchange.key is not None:
                exchange.key.wait()
                exchange.queued = True
        except Refused as problem:
            if problem.retry_after is None and problem.reason in FULL:
                problem.retry_after = self.secs_until(exchange.model)
            exchange.refuse(problem)
            return
        if lease is None:
            self._set_timer()
            exchange.wait_begins()
        else:
            exchange.admitted(lease, self.pool(lease))

    async def _seek(self, exchange: Exchange) -> None:
        """Whose response it is that this worker has not seen: of another worker, or of a former."""
        response_id = exchange.response_id or ""
        try:
            answer = await self.link.ask("response", {"id": response_id}, SEEK_SECS)
            if (model := answer.get("model")) is None:
                text = f'there is no response "{response_id}" here'
                raise Refused(Reason.NOT_FOUND, text, param="id")
        except Refused as problem:
            exchange.refuse(problem)
            return
        if exchange.stage is Stage.NEW:  # the client may have left meanwhile
            self.responses.keep({response_id: model})
            exchange.model = model
            self.submit(exchange)

    def _send_admitted(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            # One that was sent before it in this loop may have failed and taken this one along.
            if isinstance(ticket, Exchange) and ticket.lease is not None and ticket.in_flight:
                if ticket.queued and ticket.key is not None:
                    ticket.queued = False
                    ticket.key.served()
                ticket.admitted(ticket.lease, self.pool(ticket.lease))

    def engine_failed(self, exchange: Exchange, failure: EngineFailure) -> None:
        """The engine broke off or refused a connection while ``exchange`` was on it."""
        lease = exchange.lease
        if lease is not None:
            # Broken mid-answer: its other requests may be well. Not even begun: nobody else tries.
            news = self.admission.suspect(lease) if exchange.repeatable else not lease.revoked
            now = self.clock()
            if news and now >= lease.reported_at + REPORT_SECS:
                lease.reported_at = now
                self.link.send(EngineLost(lease.model, lease.epoch, failure.error))
            self._set_timer()
        problem = exchange.failure_problem(failure)
        self._again_or_fail(exchange, problem, between_chunks=failure.between_chunks)

    def _again_or_fail(self, exchange: Exchange, problem: Refused, *, between_chunks: bool) -> None:
        exchange.drop_connection()
        if not self.alone and self.admission.wait_again(exchange):
            self.observer.retried[exchange.model] += 1
            if exchange.key is not None:
                exchange.key.wait_again()
                exchange.queued = True
            self.log.again(problem, request=exchange.request_id, model=exchange.model)
            self._set_timer()
            self._send_admitted(self.admission.admit_waiting(exchange.model))
        elif exchange.repeatable:
            exchange.refuse(problem)
        else:
            exchange.break_off(problem, between_chunks=between_chunks)

    def refuse_all(self, tickets: list[Ticket], problem: Callable[[str], Refused]) -> None:
        for ticket in tickets:
            if isinstance(ticket, Exchange):
                ticket.refuse(problem(ticket.model))

    # ---- leases and their connections -----------------------------------------------------------

    def pool(self, lease: Lease) -> EnginePool:
        pool: EnginePool | None = lease.pool
        if pool is None:
            pool = lease.pool = EnginePool(lease.address, lambda: self._check_drained(lease))
        return pool

    def _on_idle(self, lease: Lease) -> None:
        self.pool(lease).close()  # calls _check_drained, now or when the last connection is gone

    def _check_drained(self, lease: Lease) -> None:
        if self.pool(lease).empty and self.admission.forget(lease):
            self.link.send(Drained(lease.model, lease.epoch))

    # ---- what the supervisor says ---------------------------------------------------------------

    def on_message(self, message: Message) -> None:
        match message:
            case Grant():
                admitted = self.admission.grant(message.model, message.epoch, message.address)
                if (held := self.admission.held(message.model)) is not None:
                    self.pool(held).reopen()
                switch = self._switches.granted(message.model)
                for ticket in admitted:
                    ticket.switch = switch
                self._send_admitted(admitted)
            case Revoke():
                self._revoke(message)
            case Cut():
                problem = Refused(problems.reason_of(message.code), message.message)
                for ticket in self.admission.in_flight_on(message.model, message.epoch):
                    if isinstance(ticket, Exchange):
                        ticket.refuse(problem)
            case Refuse():
                refusal = Refused(
                    problems.reason_of(message.code),
                    message.message,
                    retry_after=message.retry_after,
                )
                self.refuse_all(self.admission.refuse(message.model), lambda _model: refusal)
            case Catalog():
                self.models = {info.name: info for info in message.infos()}
                self.observer.known = self.log.known = self.models
                self._know(names_of(self.models.values()))
                self._switches.see(self.models.values())
                self._take_times(message.times)
                self.admission.set_models(self.models)
            case News():
                self.feeds.heard(message)
            case Collect():
                self.link.send(Collected(message.id, self.exposition.snapshot()))
            case _:
                logger.warning("the supervisor sent a message that a gateway has no use for: %s",
                               message.kind)  # fmt: skip

    def _know(self, names: dict[str, str]) -> None:
        self._names = names
        if self.guard is not None:
            self.guard.know(names)

    def _take_times(self, times: Mapping[str, float]) -> None:
        """A reload may have changed them; who waits already keeps its deadline."""
        self.admission.wait_secs = times.get("request_timeout_secs", self.admission.wait_secs)
        self.startup_secs = times.get("startup_timeout_secs", self.startup_secs)
        switches = self._switches
        switches.min_active_secs = times.get("min_active_secs", switches.min_active_secs)

    def _revoke(self, message: Revoke) -> None:
        lease = self.admission.revoke(message.model, message.epoch)
        if lease is None:
            self.link.send(Drained(message.model, message.epoch))
            return
        self.pool(lease).close()
        if not message.dead:
            return
        problem = Refused(Reason.ENGINE_DIED, f'the engine of model "{message.model}" died')
        for ticket in list(lease.in_flight):
            if isinstance(ticket, Exchange):
                self._again_or_fail(ticket, problem, between_chunks=ticket.between_chunks)

    def _greetings(self) -> list[Message]:
        return [*self.feeds.greetings(), *map(Kept, self.responses.parts())]

    def _hello(self) -> Hello:
        return Hello(role="gateway", worker=self._worker, holds=self.admission.holds())

    def _active_models(self) -> list[str]:
        """Models with anything to report: waiters, requests in flight, or a past."""
        return [line.model for line in self.admission.lines()]

    # ---- time -----------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        due = self.admission.wake_at
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
        expired, admitted = self.admission.tick()
        self.refuse_all(expired, self._wait_expired)
        self._send_admitted(admitted)
        self._set_timer()

    def _wait_expired(self, model: str) -> Refused:
        return Refused(
            Reason.WAIT_EXPIRED,
            f'model "{model}" could not be made ready in time',
            hint="the limit is policy.request_timeout_secs, or what the client asked for",
            retry_after=self.secs_until(model),
        )

    def secs_until(self, model: str) -> float:
        """For Retry-After: when a request that is turned away now would be answered. An estimate is
        rounded, not rounded up: 2.1 s told as 3 is further from the truth than 2."""
        serves = self._serves(model)
        coming = 0.0 if serves else self.secs_coming(model)
        place = self.admission.secs_to_place(model, coming)
        if place is not None:
            return round(place)
        return 1.0 if serves else round(coming)  # 1: nobody has been seen to leave yet

    def _serves(self, model: str) -> bool:
        held = self.admission.held(model)
        return held is not None and held.suspect_until is None

    def secs_coming(self, model: str) -> float:
        return self._switches.secs_until(model, self.admission.wanted())

    # ---- stopping -------------------------------------------------------------------------------

    def close(self) -> None:
        """Cut what is left and give up all connections to engines."""
        if self._timer is not None:
            self._timer.cancel()
        self.draining = True
        self.feeds.close()
        turn_away(self)  # nobody takes the places that become free below
        problem = Refused(Reason.SHUTTING_DOWN, "the gateway is shutting down")
        for line in list(self.admission.lines()):
            for lease in list(line.leases.values()):
                for ticket in list(lease.in_flight):
                    if isinstance(ticket, Exchange):
                        ticket.refuse(problem)
                self.pool(lease).close()
