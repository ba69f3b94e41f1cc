"""``llmux gateway``: the unprivileged front end, its workers and the sockets they share."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

from llmux.config.files.last_good import LastGood
from llmux.config.keyfile import load_keys, resolve_secret
from llmux.config.schema import Config, Key
from llmux.daemon.process import credentials_directory, run
from llmux.daemon.supervisor import LAST_GOOD, SOCKET
from llmux.drivers.systemd.notify import SdNotifier, listen_fds
from llmux.drivers.systemd.own_unit import OwnUnit
from llmux.gateway.client.tls import Tls
from llmux.gateway.server import WATCHDOG_BEATS, access_of, bind_all, serve_gateway
from llmux.gateway.stopping import Handover
from llmux.gateway.workers import BEATS, HAND_OVER, HANG_SECS, Parent, Unit, WorkerNotifier

log = logging.getLogger("llmux")

ORPHAN_SECS = 100.0  # longer than the unit's TimeoutStartSec, in which the successor is up


def gateway(
    path: str,
    *,
    link: str = SOCKET,
    last_good: str = LAST_GOOD,
    hang_secs: float = HANG_SECS,
    orphan_secs: float = ORPHAN_SECS,
    unit: Unit | None = None,
) -> None:
    """Run the front end as a service. Its sockets live in systemd's fd store; a worker that hangs
    for ``hang_secs`` is replaced; workers whose parent is gone serve on until its successor's are
    up, for ``orphan_secs`` at most."""
    config = LastGood(last_good).load(path, check_files=False).config
    notifier = SdNotifier()
    secrets = Secrets(config)
    secrets.check()
    sockets, metrics_sockets = _kept_sockets(config, notifier)

    def work(told: WorkerNotifier) -> None:
        serving = functools.partial(
            serve_gateway,
            config,
            link=link,
            sockets=sockets,
            metrics_sockets=metrics_sockets,
            notifier=told,
            watchdog_secs=WATCHDOG_BEATS * hang_secs / BEATS,
            keys=secrets.keys,
            tls=secrets.tls,
        )
        run(_gateway_worker(serving, told.life, config.gateway.drain_timeout_secs, orphan_secs))

    Parent(config.gateway.workers, work, notifier, unit or OwnUnit(), hang_secs).run()


async def _gateway_worker(
    serving: Callable[..., Awaitable[None]],
    life: socket.socket,
    drain_secs: float,
    orphan_secs: float,
) -> None:
    loop = asyncio.get_running_loop()
    stop, handover = asyncio.Event(), Handover(drain_secs)

    def stop_now() -> None:
        handover.hurried.set()
        stop.set()

    def hand_over() -> None:
        if not stop.is_set():
            # The kernel ends a worker that hangs while it drains: no parent watches it.
            signal.setitimer(signal.ITIMER_REAL, drain_secs + HANG_SECS)
            handover.begun = True
            stop.set()

    def orphaned() -> None:
        loop.remove_reader(life)
        loop.call_later(orphan_secs, hand_over)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_now)
    loop.add_signal_handler(HAND_OVER, hand_over)
    reload: list[Callable[[], None]] = []
    loop.add_signal_handler(signal.SIGHUP, lambda: [part() for part in reload])
    loop.add_reader(life, orphaned)
    await serving(stop=stop, handover=handover, reload=reload)


class Secrets:
    """Paths of the API keys and the certificate, credentials resolved."""

    def __init__(self, config: Config) -> None:
        settings = config.gateway
        resolve = functools.partial(resolve_secret, credentials=credentials_directory())
        self.keys: Callable[[], tuple[Key, ...]] | None = None
        if settings.keys_file is not None:
            self.keys = functools.partial(load_keys, resolve(settings.keys_file))
        self.tls: tuple[str, str] | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.tls = (resolve(settings.tls_certificate), resolve(settings.tls_key))

    def check(self) -> None:
        """Raise for unreadable keys or certificates, before anything listens."""
        if self.keys is not None:
            self.keys()
        if self.tls is not None:
            Tls(*self.tls)


def _kept_sockets(
    config: Config, notifier: SdNotifier
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Return one listening socket per address for clients, and those for metrics: from the fd store
    if kept there, else bound and stored. Sockets of addresses no longer configured are dropped."""
    kept = listen_fds()

    def sockets_for(addresses: Sequence[str], purpose: str) -> list[socket.socket]:
        sockets = []
        for address in addresses:
            name = f"{purpose}-" + address.replace(":", "_").replace("/", "-")
            stored = kept.pop(name, [])
            if not stored:
                stored = bind_all([address], access_of(config))
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
    """Bind the metrics addresses. A port that is taken (9090 is Prometheus' own) is logged only."""
    try:
        return bind(config.metrics_addresses())
    except OSError as error:
        log.error("no metrics port: %s (set metrics_port, or 0 for none)", error)
        return []
