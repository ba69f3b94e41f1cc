"""What llmux's long-running processes share: their log and their loop."""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from llmux.drivers.systemd import journal as journald

if TYPE_CHECKING:
    import asyncio

# Who reloads finds it done a moment later; of a storm of signals one in RELOAD_SECS is heard.
RELOADS_AT_ONCE: Final = 10
RELOAD_SECS: Final = 1.0


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
    """Reload after a SIGHUP: one at a time, and once for all that come before the next begins.
    After RELOADS_AT_ONCE in so many RELOAD_SECS the next one begins that much later."""
    import asyncio

    loop = asyncio.get_running_loop()
    begun: list[asyncio.Task[None]] = []  # the one that runs, or after which none may begin yet
    times: deque[float] = deque(maxlen=RELOADS_AT_ONCE)
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
        times.append(loop.time())
        task.add_done_callback(ended)

    def ended(_: object) -> None:
        many = len(times) == RELOADS_AT_ONCE
        many = many and loop.time() - times[0] < RELOADS_AT_ONCE * RELOAD_SECS
        loop.call_later(RELOAD_SECS if many else 0.0, rested)

    def rested() -> None:
        begun.clear()
        if asked:
            begin()

    loop.add_signal_handler(signal.SIGHUP, hangup)
