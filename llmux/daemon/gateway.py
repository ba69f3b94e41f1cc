"""``llmux gateway``: the unprivileged front end, its workers and the sockets they share."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import llmux
from llmux.config.files.last_good import LastGood
from llmux.config.schema import Config, Key
from llmux.daemon.places import LAST_GOOD, SOCKET, credentials_directory, resolve_secret
from llmux.drivers.systemd.notify import SdNotifier, listen_fds
from llmux.drivers.systemd.own_unit import OwnUnit
from llmux.gateway.client.listeners import access_of, bind_all
from llmux.gateway.workers import HANG_SECS, Parent, Unit, WorkerNotifier

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
    code: str = llmux.__file__,
) -> None:
    """Run the front end as a service. Its sockets live in systemd's fd store; a worker that hangs
    for ``hang_secs`` is replaced; workers whose parent is gone serve on until its successor's are
    up, for ``orphan_secs`` at most. This process is the workers' parent and imports little: their
    modules are imported in each, or before the fork where several share them."""
    config = LastGood(last_good).load(path, check_files=False).config
    secrets = Secrets(config)
    secrets.check()
    notifier = SdNotifier()
    sockets, metrics_sockets = sockets_of(config, notifier, listen_fds())
    work = functools.partial(
        _work,
        config,
        link=link,
        sockets=sockets,
        metrics_sockets=metrics_sockets,
        keys=secrets.keys,
        tls=secrets.tls,
        hang_secs=hang_secs,
        orphan_secs=orphan_secs,
    )
    if config.gateway.workers > 1:
        importlib.import_module("llmux.daemon.gateway_worker")  # once: workers share its memory
    parent = Parent(config.gateway.workers, work, notifier, unit or OwnUnit(), hang_secs)
    parent.outdated = Installed(code).is_replaced
    try:
        parent.run()
    finally:
        for listener in (*sockets, *metrics_sockets):
            listener.close()
        notifier.close()


def _work(config: Config, told: WorkerNotifier, **given: Any) -> None:
    from llmux.daemon import gateway_worker

    gateway_worker.work(config, told, **given)


class Secrets:
    """Paths of the API keys and the certificate, credentials resolved."""

    def __init__(self, config: Config) -> None:
        settings = config.gateway
        resolve = functools.partial(resolve_secret, credentials=credentials_directory())
        self.keys: Callable[[], tuple[Key, ...]] | None = None
        if settings.keys_file is not None:
            from llmux.config.keyfile import load_keys  # brings OpenSSL along

            self.keys = functools.partial(load_keys, resolve(settings.keys_file))
        self.tls: tuple[str, str] | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.tls = (resolve(settings.tls_certificate), resolve(settings.tls_key))

    def check(self) -> None:
        """Raise for unreadable keys or certificates, before anything listens."""
        if self.keys is not None:
            self.keys()
        if self.tls is not None:
            from llmux.gateway.client.tls import Tls  # likewise

            Tls(*self.tls)


class Installed:
    """The package's code. A worker that starts after an upgrade would import what the parent's
    does not fit."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._at_start = self._identity()

    def is_replaced(self) -> bool:
        return self._identity() != self._at_start

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._file)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def sockets_of(
    config: Config, notifier: SdNotifier, kept: dict[str, list[socket.socket]]
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Return one listening socket per address for clients, and those for metrics: from the fd store
    if ``kept`` there, else bound and stored. Those of addresses no longer configured are
    dropped."""

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
