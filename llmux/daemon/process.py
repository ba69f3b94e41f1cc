"""What llmux's long-running processes share: their log and their loop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from llmux.drivers.systemd import journal as journald

if TYPE_CHECKING:
    import asyncio

RELOAD_SECS: Final = 1.0  # from the end of a reload to the next: a storm of signals has one of them


def setup_logging(verbose: bool) -> None:
    journald.setup_logging(verbose)
    for name in ("sanic", "sanic.root", "sanic.server"):  # silence its banner
        logging.getLogger(name).setLevel(logging.WARNING)
    # uvloop warns at each chunk for a TLS client that said goodbye and reads no more.
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def run(main: Awaitable[None]) -> None:
    """Run ``main`` on uvloop."""
    # Imported late: the gateway's parent has no loop.
    import asyncio

    import uvloop

    async def body() -> None:
        await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


def on_hangup(reload: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Reload after a SIGHUP: one at a time, and once for all that come before the next begins."""
    import asyncio

    loop = asyncio.get_running_loop()
    begun: list[asyncio.Task[None]] = []  # the one that runs, or ended less than RELOAD_SECS ago
    asked = False

    def hangup() -> None:
        nonlocal asked
        asked = True
        if not begun:
            begin()

    def begin() -> None:
        nonlocal asked
        asked = False
        task = loop.create_task(reload())
        begun.append(task)
        task.add_done_callback(lambda _: loop.call_later(RELOAD_SECS, rested))

    def rested() -> None:
        begun.clear()
        if asked:
            begin()

    loop.add_signal_handler(signal.SIGHUP, hangup)
