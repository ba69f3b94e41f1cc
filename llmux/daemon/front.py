"""``llmux gateway``: the unprivileged front end, its workers and the sockets they share."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

from llmux.config.keyfile import load_keys, resolve_secret
from llmux.config.lastgood import LastGood
from llmux.config.schema import Config, Key
from llmux.daemon.process import run, stop_on_signals
from llmux.daemon.supervisor import LAST_GOOD, SOCKET
from llmux.drivers.notify import SdNotifier, listen_fds, watchdog_interval
from llmux.gateway.server import WATCHDOG_BEATS, bind_all, serve_gateway
from llmux.gateway.tls import Tls
from llmux.gateway.workers import BEATS, HANG_SECS, Parent
from llmux.ports import Notifier

log = logging.getLogger("llmux")


def gateway(
    path: str,
    *,
    link: str = SOCKET,
    last_good: str = LAST_GOOD,
    hang_secs: float = HANG_SECS,
) -> None:
    """The front end as a service of its own. Its sockets live in systemd's fd store. One of several
    workers that stands still for ``hang_secs`` is replaced."""
    config = LastGood(last_good).load(path, check_files=False).config
    notifier = SdNotifier()
    secrets = Secrets(config)
    secrets.check()
    sockets, metrics_sockets = _kept_sockets(config, notifier)

    def work(told: Notifier, watchdog_secs: float | None, life: socket.socket | None) -> None:
        serving = functools.partial(
            serve_gateway,
            config,
            link=link,
            sockets=sockets,
            metrics_sockets=metrics_sockets,
            notifier=told,
            watchdog_secs=watchdog_secs,
            keys=secrets.keys,
            tls=secrets.tls,
        )
        run(_gateway_worker(serving, life))

    count = config.gateway.workers
    if count == 1:
        work(notifier, watchdog_interval(), None)
    else:
        beat = hang_secs / BEATS
        Parent(
            count, lambda told: work(told, WATCHDOG_BEATS * beat, told.life), notifier, hang_secs
        ).run()


async def _gateway_worker(
    serving: Callable[..., Awaitable[None]], life: socket.socket | None
) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    loop = asyncio.get_running_loop()
    reload: list[Callable[[], None]] = []
    loop.add_signal_handler(signal.SIGHUP, lambda: [part() for part in reload])
    if life is not None:

        def orphaned() -> None:
            loop.remove_reader(life)
            stop.set()

        loop.add_reader(life, orphaned)
    await serving(stop=stop, reload=reload)


class Secrets:
    """Where keys and certificate are, credentials resolved."""

    def __init__(self, config: Config) -> None:
        settings = config.gateway
        self.keys: Callable[[], tuple[Key, ...]] | None = None
        if settings.keys_file is not None:
            self.keys = functools.partial(load_keys, resolve_secret(settings.keys_file))
        self.tls: tuple[str, str] | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.tls = (resolve_secret(settings.tls_certificate), resolve_secret(settings.tls_key))

    def check(self) -> None:
        """Raises what is wrong with them before anything listens."""
        if self.keys is not None:
            self.keys()
        if self.tls is not None:
            Tls(*self.tls)


def _kept_sockets(
    config: Config, notifier: SdNotifier
) -> tuple[list[socket.socket], list[socket.socket]]:
    """One listening socket per configured address, for clients and for metrics: from the fd store
    when it is there, else bound and stored. What is stored and configured no longer is dropped."""
    kept = listen_fds()

    def sockets_for(addresses: Sequence[str], purpose: str) -> list[socket.socket]:
        sockets = []
        for address in addresses:
            name = f"{purpose}-" + address.replace(":", "_").replace("/", "-")
            stored = kept.pop(name, [])
            if not stored:
                stored = bind_all([address])
                notifier.store_fds(name, stored)
            sockets += stored
        return sockets

    clients = sockets_for(config.listen_addresses(), "listen")
    metrics = metrics_sockets(config, lambda addresses: sockets_for(addresses, "metrics"))
    for name, leftover in kept.items():
        notifier.drop_fds(name)
        for sock in leftover:
            sock.close()
    return clients, metrics


def metrics_sockets(
    config: Config, bind: Callable[[Sequence[str]], list[socket.socket]]
) -> list[socket.socket]:
    """Their port may be taken (9090 is Prometheus' own): no reason to serve no models."""
    try:
        return bind(config.metrics_addresses())
    except OSError as error:
        log.error("no metrics port: %s (set metrics_port, or 0 for none)", error)
        return []
