"""One worker of ``llmux gateway``: what needs a loop, and is not in the parent's memory."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

from llmux.config.schema import Config, Key
from llmux.daemon.process import on_hangup, run
from llmux.gateway.server import WATCHDOG_BEATS, serve_gateway
from llmux.gateway.stopping import Handover
from llmux.gateway.workers import BEATS, HAND_OVER, HANG_SECS, WorkerNotifier


def work(
    config: Config,
    told: WorkerNotifier,
    *,
    link: str,
    sockets: Sequence[socket.socket],
    metrics_sockets: Sequence[socket.socket],
    keys: Callable[[], tuple[Key, ...]] | None,
    tls: tuple[str, str] | None,
    hang_secs: float,
    orphan_secs: float,
) -> None:
    serving = functools.partial(
        serve_gateway,
        config,
        link=link,
        sockets=sockets,
        metrics_sockets=metrics_sockets,
        notifier=told,
        watchdog_secs=WATCHDOG_BEATS * hang_secs / BEATS,
        keys=keys,
        tls=tls,
    )
    run(_serve(serving, told.life, config.gateway.drain_timeout_secs, orphan_secs))


async def _serve(
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
    parts: list[Callable[[], None]] = []

    async def reload() -> None:
        for part in parts:
            part()

    on_hangup(reload)
    loop.add_reader(life, orphaned)
    await serving(stop=stop, handover=handover, reload=parts)
