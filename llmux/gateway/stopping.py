"""Stopping: no new connections; running responses finish; queued requests stay only if their model
is due in time.

The listening sockets stay open, held by systemd or by the caller: connections made meanwhile wait
there for the next gateway. A queued request cannot be handed over, so it is answered here, or
refused with a Retry-After: at once if its model is not expected in time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmux.gateway.client.connection import ClientConnection
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.worker import Worker

logger = logging.getLogger(__name__)

ABORT_SECS: Final = 1.0  # for error events to be sent after ``secs``


@dataclass(frozen=True, slots=True)
class DrainLimits:
    """``secs``: for running responses and queued requests. ``away_secs``: without a supervisor no
    model becomes available; a restarted one is back by then. ``waiters``: False when no model can
    become available (embedded mode)."""

    secs: float = 30.0
    away_secs: float = 3.0
    waiters: bool = True


class Handover:
    """Drain beside a successor that accepts already: for ``secs``, unless a stop hurries it.

    Idle connections stay until their next response or their idle timeout: a request that is on its
    way to one that is closed fails at its client.
    """

    def __init__(self, secs: float) -> None:
        self.secs = secs
        self.begun = False
        self.hurried = asyncio.Event()


async def drain(
    dispatch: Dispatch,
    servers: Sequence[Any],
    limits: DrainLimits,
    handover: Handover | None = None,
) -> None:
    """Returns when every client is gone, or when the time is up and the rest has been cut."""
    worker = dispatch.worker
    for server in servers:
        server.close()
    if handover is not None and handover.begun:
        _start_draining(dispatch, handover.secs)
        await _clients_gone(worker, servers, handover.secs, handover.hurried)
        if not handover.hurried.is_set():
            await _cut(dispatch, servers, handover.secs)
            return
    _start_draining(dispatch, limits.secs)
    worker.closing = True
    # Connections accepted in this turn of the loop are made in the next: they count as well.
    await asyncio.sleep(0)
    if not limits.waiters:
        dispatch.stop_queueing()
    for client in connections(servers):
        client.close_if_idle()
    watch = asyncio.get_running_loop().create_task(_watch_supervisor(dispatch, limits.away_secs))
    try:
        await _clients_gone(worker, servers, limits.secs)
    finally:
        watch.cancel()
    await _cut(dispatch, servers, limits.secs)


async def _cut(dispatch: Dispatch, servers: Sequence[Any], secs: float) -> None:
    left = len(connections(servers))
    if left:
        logger.warning("%d requests were still open %g seconds after the stop; cutting them",
                       left, secs)  # fmt: skip
    dispatch.close()
    await _clients_gone(dispatch.worker, servers, ABORT_SECS)


def _start_draining(dispatch: Dispatch, grace_secs: float) -> None:
    """Refuse queued requests whose model is expected later than ``grace_secs``."""
    worker = dispatch.worker
    worker.draining = True
    worker.subscriptions.close()
    late = {model: round(dispatch.secs_coming(model)) for model in worker.admission.wanted()}
    for model, seconds in late.items():
        if seconds > grace_secs:
            dispatch.refuse_stopping(worker.admission.refuse(model), seconds)


def connections(servers: Sequence[Any]) -> list[ClientConnection]:
    return [client for server in servers for client in server.connections]


async def _watch_supervisor(dispatch: Dispatch, away_secs: float) -> None:
    """Refuse queued requests once the supervisor has been away for ``away_secs``."""
    await dispatch.worker.link.gone_for(away_secs)
    dispatch.stop_queueing()


async def _clients_gone(
    worker: Worker[Any],
    servers: Sequence[Any],
    timeout: float,
    hurried: asyncio.Event | None = None,
) -> None:
    """Returns when every client is gone, after ``timeout``, or when ``hurried`` is set."""
    loop = asyncio.get_running_loop()
    waits: list[asyncio.Task[Any]] = [loop.create_task(_no_client(worker, servers))]
    if hurried is not None:
        waits.append(loop.create_task(hurried.wait()))
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _no_client(worker: Worker[Any], servers: Sequence[Any]) -> None:
    while connections(servers):
        worker.client_left.clear()
        await worker.client_left.wait()
