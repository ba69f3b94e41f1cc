"""A gateway with two stand-in engines behind it, in a thread, for clients that block."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_harness import ALIASES, Stage, stage, until  # found by the line above
from standin_process import standin

from llmux.protocol import Grant, Revoke

SPEED = ("--standin-tokens-per-sec", "400")


class Front:
    """``alpha`` answers at once, ``beta`` slowly and only when a test grants it."""

    def __init__(self, s: Stage, loop: asyncio.AbstractEventLoop, beta: Path) -> None:
        self.stage = s
        self.url = f"http://127.0.0.1:{s.port}"
        self._loop = loop
        self._beta = beta

    def do(self, act: Callable[[], Awaitable[Any]]) -> Any:
        """In the gateway's own loop."""

        async def run() -> Any:
            return await act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)

    def until(self, condition: Callable[[], bool]) -> None:
        self.do(lambda: until(condition))

    def grant_beta(self, epoch: str) -> None:
        async def grant() -> None:
            self.stage.supervisor.say(Grant("beta", epoch, uds=str(self._beta)))
            await until(lambda: self.stage.gateway.admission.held("beta") is not None)

        self.do(grant)

    def places(self, places: int, *, waiting: int) -> None:
        admission = self.stage.gateway.admission
        admission._max_in_flight, admission._max_waiting = places, waiting
        self._counted = dict(self.stage.gateway.observer.requests)

    def refused(self, model: str, status: int) -> int:
        """Since ``places`` was called."""
        now = self.stage.gateway.observer.requests
        return now[model, status] - self._counted.get((model, status), 0)

    def revoke_beta(self, epoch: str) -> None:
        async def revoke() -> None:
            self.stage.supervisor.say(Revoke("beta", epoch))
            await until(lambda: self.stage.gateway.admission.held("beta") is None)

        self.do(revoke)


@pytest.fixture(scope="session")
def front() -> Iterator[Front]:
    ready: Future[Front] = Future()
    ended = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with (
            stage() as s,
            standin(s, "alpha", aliases=ALIASES["alpha"]) as alpha,
            standin(s, "beta", *SPEED) as beta,
        ):
            s.supervisor.say(Grant("alpha", "a1", uds=str(alpha)))
            made = Front(s, loop, beta)
            made.end = lambda: loop.call_soon_threadsafe(stop.set)  # type: ignore[attr-defined]
            ready.set_result(made)
            await stop.wait()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise
        finally:
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    made = ready.result(30)
    yield made
    made.end()  # type: ignore[attr-defined]
    assert ended.wait(30)
    thread.join(5)
