"""What llmux's long-running processes share: their log and their loop."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from llmux.drivers.systemd import journal as journald


def setup_logging(verbose: bool) -> None:
    journald.setup_logging(verbose)
    for name in ("sanic", "sanic.root", "sanic.server"):  # silence its banner
        logging.getLogger(name).setLevel(logging.WARNING)


def run(main: Awaitable[None]) -> None:
    """Run ``main`` on uvloop."""
    # Imported late: the gateway's parent has no loop.
    import asyncio

    import uvloop

    async def body() -> None:
        await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())
