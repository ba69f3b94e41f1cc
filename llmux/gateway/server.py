"""A gateway worker from start to stop: Sanic embedded in the caller's loop, READY, drain.

The caller owns the loop, the signal handlers and the process; this module owns the listening
sockets. Sockets passed in (from systemd's fd store) are used as they are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from llmux.config.schema import Config
from llmux.gateway.admission.keys import LoadKeys
from llmux.gateway.client.connection import ClientConnection
from llmux.gateway.client.half_closed import check_half_closed
from llmux.gateway.client.listeners import BACKLOG, access_of, bind_all, describe_socket
from llmux.gateway.client.tls import Tls
from llmux.gateway.control.app import App, build_app
from llmux.gateway.dispatch import Dispatch
from llmux.gateway.exchange.exchange import Exchange
from llmux.gateway.journal import on_loop_error
from llmux.gateway.link import Link, LinkTarget
from llmux.gateway.metrics import MetricsPage, serve_metrics
from llmux.gateway.stopping import DrainLimits, Handover, connections, drain
from llmux.gateway.supervisor import AWAY_SECS, Supervisor
from llmux.gateway.ui.board import Board
from llmux.gateway.ui.pages import add_ui_routes
from llmux.gateway.worker import Worker
from llmux.ports import Notifier

logger = logging.getLogger(__name__)

Reload = list[Callable[[], None]]  # filled by the worker with the actions of a SIGHUP

WATCHDOG_BEATS = 3  # watchdog pings per watchdog interval
READY_SECS = 10.0  # then ready without a supervisor too: requests get an error that says so
SWEEP_SECS = 1.0  # resolution of client connections' deadlines
IDLE_SWEEPS = 4  # that one sweep stands for while nobody is connected


async def serve_gateway(
    config: Config,
    *,
    link: LinkTarget,
    sockets: Sequence[socket.socket] = (),
    notifier: Notifier | None = None,
    stop: asyncio.Event,
    worker: str | None = None,
    on_listen: Callable[[Sequence[socket.socket]], None] | None = None,
    on_started: Callable[[Worker[Exchange]], None] | None = None,
    watchdog_secs: float | None = None,
    drain_limits: DrainLimits | None = None,
    handover: Handover | None = None,
    keys: LoadKeys | None = None,
    reload: Reload | None = None,
    metrics_sockets: Sequence[socket.socket] = (),
    tls: tuple[str, str] | None = None,
    ready_secs: float = READY_SECS,
    away_secs: float = AWAY_SECS,
) -> None:
    """Serve until ``stop`` is set, then drain. Returns when every client connection is gone.

    ``link``: path of the supervisor's socket, or one end of a socket pair. ``on_listen`` gets the
    listening sockets once (to keep them in the fd store), ``on_started`` the worker when it is
    ready: the supervisor was reached, or ``ready_secs`` have passed. After ``away_secs`` without
    the supervisor, requests that would have to wait are refused.
    """
    listeners = list(sockets) or bind_all(config.listen_addresses(), access_of(config))
    connection = Link(link)
    name = worker or f"gateway-{os.getpid()}"
    state: Worker[Exchange] = Worker(config, connection, name=name, keys=keys)
    dispatch = Dispatch(state)
    metrics = MetricsPage(dispatch)
    supervisor = Supervisor(dispatch, metrics.snapshot)
    app = build_app(config, dispatch, metrics)
    if config.gateway.ui:
        add_ui_routes(app, Board(state), keys=state.guard is not None)
    servers: list[Any] = []
    metrics_servers: list[asyncio.Server] = []
    background: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(on_loop_error)
    secured = None if tls is None else Tls(*tls)
    if reload is not None:
        reload += [part.reload for part in (state.guard, secured) if part is not None]
    try:
        background += map(loop.create_task, (connection.run(), supervisor.watch(away_secs)))
        servers = await _listen(app, listeners, secured.context if secured else None)
        metrics_servers += await serve_metrics(metrics, metrics_sockets)
        background.append(loop.create_task(_sweep(state, servers, notifier, watchdog_secs)))
        if on_listen is not None:
            on_listen(listeners)
        where = ", ".join(describe_socket(listener) for listener in listeners)
        logger.info("Gateway listening on %s", where)
        await _first_contact(connection, stop, ready_secs)
        await _until(stop, state, f"listening on {where}", notifier, on_started)
        _stop_listening(metrics_servers)
        await drain(dispatch, servers, drain_limits or DrainLimits(), handover)
    finally:
        await _close(app, dispatch, servers, metrics_servers, background)


# ---- running ------------------------------------------------------------------------------------


async def _listen(
    app: App, listeners: Sequence[socket.socket], context: ssl.SSLContext | None
) -> list[Any]:
    """One AsyncioServer of Sanic's per socket, all for the one app. TLS is for TCP."""
    servers: list[Any] = []
    for listener in listeners:
        server = await app.create_server(
            sock=listener,
            ssl=None if listener.family == socket.AF_UNIX else context,
            protocol=ClientConnection,
            backlog=BACKLOG,
            return_asyncio_server=True,
            # Otherwise connections are accepted before startup() has run.
            asyncio_server_kwargs={"start_serving": False},
        )
        assert server is not None, "create_server returns a server when asked for one"
        if not servers:
            await server.startup()  # type: ignore[no-untyped-call]  # Sanic's
            await server.before_start()  # type: ignore[no-untyped-call]  # Sanic's
        servers.append(server)
    for server in servers:
        await server.start_serving()
    await servers[0].after_start()
    return servers


async def _until(
    stop: asyncio.Event,
    worker: Worker[Exchange],
    status: str,
    notifier: Notifier | None,
    on_started: Callable[[Worker[Exchange]], None] | None,
) -> None:
    """Report the start, wait for ``stop``, report that."""
    if not stop.is_set():
        if notifier is not None:
            notifier.ready()
            notifier.status(status)
        if on_started is not None:
            on_started(worker)
        await stop.wait()
    if notifier is not None:
        notifier.stopping()


async def _first_contact(link: Link, stop: asyncio.Event, timeout: float) -> None:
    """Wait for the supervisor, for ``stop`` or for ``timeout``."""
    loop = asyncio.get_running_loop()
    waits = [loop.create_task(link.here.wait()), loop.create_task(stop.wait())]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _sweep(
    worker: Worker[Any],
    servers: Sequence[Any],
    notifier: Notifier | None,
    watchdog_secs: float | None,
) -> None:
    """Once a second: expire connections whose deadline passed, and ping the watchdog, which is thus
    fed exactly as long as the loop turns. More rarely while nobody is connected."""
    interval = (
        SWEEP_SECS if watchdog_secs is None else min(SWEEP_SECS, watchdog_secs / WATCHDOG_BEATS)
    )
    while True:
        if notifier is not None and watchdog_secs is not None:
            notifier.watchdog()
        now = worker.clock()
        clients = connections(servers)
        for client in clients:
            if 0.0 < client.deadline < now:
                client.expire()
            else:
                check_half_closed(client, now)
        if clients:
            await asyncio.sleep(interval)
        else:
            worker.client_came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SWEEPS * interval):
                    await worker.client_came.wait()


def _stop_listening(servers: Sequence[asyncio.Server]) -> None:
    for server in servers:
        server.close()


async def _close(
    app: App,
    dispatch: Dispatch,
    servers: Sequence[Any],
    metrics_servers: Sequence[asyncio.Server],
    background: Sequence[asyncio.Task[None]],
) -> None:
    _stop_listening(metrics_servers)
    for server in servers:
        if server.is_serving():
            server.close()
    dispatch.close()
    for client in connections(servers):
        client.abort()
    for task in background:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*background, return_exceptions=True)
    if servers:
        await servers[0].before_stop()
        await servers[0].after_stop()
    app.__class__.unregister_app(app)  # Sanic keeps every app in a global table
