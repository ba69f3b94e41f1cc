"""A gateway worker from start to stop: sockets, Sanic embedded in the caller's loop, READY, drain.

The caller owns the loop, the signal handlers and the process; this module owns the listening
sockets. Those that were handed in (systemd's socket activation or fd store) are used as they are
and may be stored again through ``on_listen``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmux.config.schema import Config
from llmux.gateway.absence import AWAY_SECS, mind
from llmux.gateway.app import App, build_app
from llmux.gateway.departed import look_after
from llmux.gateway.front import FrontProtocol
from llmux.gateway.gateway import Gateway
from llmux.gateway.journal import on_loop_error
from llmux.gateway.keys import LoadKeys
from llmux.gateway.link import Link, LinkTarget
from llmux.gateway.metrics import serve_metrics
from llmux.gateway.stopping import Patience, drain, fronts
from llmux.gateway.tls import Tls
from llmux.ports import Notifier

logger = logging.getLogger(__name__)

Reload = list[Callable[[], None]]  # filled by the worker with what a SIGHUP shall do

BACKLOG = 4096  # what waits here while a worker restarts; the kernel caps it at somaxconn
WATCHDOG_BEATS = 3  # signs of life in the time after which somebody would act
READY_SECS = 10.0  # a gateway without a supervisor is up too: it says what is wrong to who asks
SWEEP_SECS = 1.0  # deadlines of client connections are coarse


async def serve_gateway(
    config: Config,
    *,
    link: LinkTarget,
    sockets: Sequence[socket.socket] = (),
    notifier: Notifier | None = None,
    stop: asyncio.Event,
    worker: str | None = None,
    on_listen: Callable[[Sequence[socket.socket]], None] | None = None,
    on_started: Callable[[Gateway], None] | None = None,
    watchdog_secs: float | None = None,
    patience: Patience | None = None,
    keys: LoadKeys | None = None,
    reload: Reload | None = None,
    metrics_sockets: Sequence[socket.socket] = (),
    tls: tuple[str, str] | None = None,
    ready_secs: float = READY_SECS,
    away_secs: float = AWAY_SECS,
) -> None:
    """Serve until ``stop`` is set, then drain. Returns when every client connection is gone.

    ``link``: path of the supervisor's socket, or one end of a socket pair. ``on_listen`` gets the
    listening sockets once (to keep them in the fd store); ``on_started`` the Gateway, when ready:
    the supervisor was reached, or ``ready_secs`` have passed. When it has been away for
    ``away_secs`` nobody waits for a model any more.
    """
    listeners = list(sockets) or bind_all(config.listen_addresses())
    supervisor = Link(link)
    name = worker or f"gateway-{os.getpid()}"
    gateway = Gateway(config, supervisor, worker=name, keys=keys)
    app = build_app(config, gateway, supervisor)
    servers: list[Any] = []
    metrics_servers: list[asyncio.Server] = []
    background: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(on_loop_error)
    secured = None if tls is None else Tls(*tls)
    if reload is not None:
        reload += [part.reload for part in (gateway.guard, secured) if part is not None]
    try:
        background.append(loop.create_task(supervisor.run()))
        background.append(loop.create_task(mind(gateway, away_secs)))
        servers = await _listen(app, listeners, secured.context if secured else None)
        metrics_servers += await serve_metrics(gateway.exposition, metrics_sockets)
        background.append(loop.create_task(_sweep(gateway, servers, notifier, watchdog_secs)))
        if on_listen is not None:
            on_listen(listeners)
        where = ", ".join(describe_socket(listener) for listener in listeners)
        logger.info("Gateway listening on %s", where)
        await _first_contact(supervisor, stop, ready_secs)
        if not stop.is_set():
            if notifier is not None:
                notifier.ready()
                notifier.status(f"listening on {where}")
            if on_started is not None:
                on_started(gateway)
            await stop.wait()
        if notifier is not None:
            notifier.stopping()
        await drain(gateway, servers, patience or Patience())
    finally:
        for server in metrics_servers:
            server.close()
        await _close(app, gateway, servers, background)


# ---- sockets ------------------------------------------------------------------------------------


def bind_all(addresses: Sequence[str]) -> list[socket.socket]:
    """Listening sockets for ``host:port`` and ``unix:/path``; an OSError names the address."""
    bound: list[socket.socket] = []
    try:
        for address in addresses:
            try:
                bound.append(_bind(address))
            except (OSError, ValueError) as error:
                cause = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                number = error.errno if isinstance(error, OSError) else None
                raise OSError(number, f"cannot listen on {address}: {cause}") from error
    except OSError:
        for listener in bound:
            listener.close()
        raise
    return bound


def _bind(address: str) -> socket.socket:
    if address.startswith("unix:"):
        return _bind_unix(Path(address.removeprefix("unix:")))
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    family, kind, protocol, _, name = socket.getaddrinfo(
        host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(name)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _somebody_listens(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def describe_socket(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{host}:{name[1]}"
    return f"unix:{name}"


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
            protocol=FrontProtocol,
            backlog=BACKLOG,
            return_asyncio_server=True,
            # Else connections are accepted before startup() has run.
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


async def _first_contact(link: Link, stop: asyncio.Event, patience: float) -> None:
    """Until the supervisor is there, or the stop, or no longer."""
    loop = asyncio.get_running_loop()
    waits = [loop.create_task(link.here.wait()), loop.create_task(stop.wait())]
    try:
        await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _sweep(
    gateway: Gateway, servers: Sequence[Any], notifier: Notifier | None, watchdog_secs: float | None
) -> None:
    """Once a second: connections whose deadline passed; and the watchdog, which is thereby fed
    exactly as long as the loop turns."""
    interval = (
        SWEEP_SECS if watchdog_secs is None else min(SWEEP_SECS, watchdog_secs / WATCHDOG_BEATS)
    )
    while True:
        if notifier is not None and watchdog_secs is not None:
            notifier.watchdog()
        now = gateway.clock()
        for front in fronts(servers):
            if 0.0 < front.deadline < now:
                front.expire()
            else:
                look_after(front, now)
        await asyncio.sleep(interval)


async def _close(
    app: App, gateway: Gateway, servers: Sequence[Any], background: Sequence[asyncio.Task[None]]
) -> None:
    for server in servers:
        if server.is_serving():
            server.close()
    gateway.close()
    for front in fronts(servers):
        front.abort()
    for task in background:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*background, return_exceptions=True)
    if servers:
        await servers[0].before_stop()
        await servers[0].after_stop()
    app.__class__.unregister_app(app)  # Sanic keeps every app by name for ever
