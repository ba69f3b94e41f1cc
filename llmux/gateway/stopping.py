"""How a worker ends: nobody new comes in, answers that run go on, and who waits stays if there is
hope.

The listening sockets stay open, held by systemd or by whoever handed them in: who connects now
waits there for the next gateway. A request that waits here cannot be handed over, so it is served
here, or told when to come back: at once where its model is not expected in time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from llmux.errors import Reason, Refused
from llmux.gateway.tickets import Ticket

if TYPE_CHECKING:
    from llmux.gateway.front import FrontProtocol
    from llmux.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

ABORT_SECS: Final = 1.0  # for error events to leave after the end of the patience


@dataclass(frozen=True, slots=True)
class Patience:
    """``secs`` for answers that run and for requests that wait. ``away_secs``: without a supervisor
    no model comes; a restarted one is back by then. ``waiters``: False where none can come."""

    secs: float = 30.0
    away_secs: float = 3.0
    waiters: bool = True


async def drain(gateway: Gateway, servers: Sequence[Any], patience: Patience) -> None:
    """Returns when every client is gone, or when the patience is at its end and all are cut."""
    for server in servers:
        server.close()
    _start_draining(gateway, patience.secs)
    # Connections accepted in this turn of the loop are made in the next: they count as well.
    await asyncio.sleep(0)
    if not patience.waiters:
        turn_away(gateway)
    for front in fronts(servers):
        front.close_if_idle()
    alone = asyncio.get_running_loop().create_task(_alone(gateway, patience.away_secs))
    try:
        await _clients_gone(gateway, servers, patience.secs)
    finally:
        alone.cancel()
    left = len(fronts(servers))
    if left:
        logger.warning("%d requests were still open %g seconds after the stop; cutting them",
                       left, patience.secs)  # fmt: skip
    gateway.close()
    await _clients_gone(gateway, servers, ABORT_SECS)


def _start_draining(gateway: Gateway, grace_secs: float) -> None:
    """What is in flight goes on. Who waits stays, unless the model is expected later than the
    grace."""
    gateway.draining = True
    gateway.feeds.close()
    late = {model: round(gateway.secs_coming(model)) for model in gateway.admission.wanted()}
    for model, seconds in late.items():
        if seconds > grace_secs:
            _tell_ending(gateway, gateway.admission.refuse(model), seconds)


def turn_away(gateway: Gateway) -> None:
    """Nobody waits for a model any more."""
    _tell_ending(gateway, gateway.admission.close())


def _tell_ending(gateway: Gateway, tickets: list[Ticket], retry_after: float | None = None) -> None:
    gateway.refuse_all(tickets, lambda model: Refused(
        Reason.SHUTTING_DOWN,
        f'cannot wait for model "{model}": the gateway is shutting down',
        retry_after=gateway.secs_until(model) if retry_after is None else retry_after,
    ))  # fmt: skip


def fronts(servers: Sequence[Any]) -> list[FrontProtocol]:
    return [front for server in servers for front in server.connections]


async def _alone(gateway: Gateway, away_secs: float) -> None:
    """Turn away who waits once the supervisor has been away for so long."""
    await gateway.link.gone_for(away_secs)
    turn_away(gateway)


async def _clients_gone(gateway: Gateway, servers: Sequence[Any], timeout: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while fronts(servers):
                gateway.client_left.clear()
                await gateway.client_left.wait()
