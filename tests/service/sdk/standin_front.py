"""A gateway with two stand-in engines behind it, in a thread, for clients that block."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_harness import ALIASES, MODELS, Stage, stage, until  # found by the line above
from sdk_front import Front, Keys
from standin_process import standin

from llmux.config.keyfile import load_keys
from llmux.protocol import Grant, Revoke

SPEED = ("--standin-tokens-per-sec", "400")
DIMENSIONS = 64  # of the stand-in's vectors, unless it is told otherwise


class StandinFront(Front):
    """``beta`` is slow, and resident only when a test says so."""

    def __init__(
        self, s: Stage, keys: Keys, engines: Mapping[str, str], stop: asyncio.Event
    ) -> None:
        url = f"http://127.0.0.1:{s.port}"
        super().__init__(url, keys, frozenset(MODELS), "beta", "alpha", DIMENSIONS, engines)
        self.stage = s
        self._loop = asyncio.get_running_loop()
        self._stop = stop

    @contextmanager
    def ready(self) -> Iterator[str]:
        async def grant() -> None:
            self.stage.supervisor.say(Grant("beta", "b", uds=self.engines["beta"]))
            await until(lambda: self.stage.gateway.admission.held("beta") is not None)

        async def revoke() -> None:
            self.stage.supervisor.say(Revoke("beta", "b"))
            await until(lambda: self.stage.gateway.admission.held("beta") is None)

        self._do(grant)
        try:
            yield "beta"
        finally:
            self._do(revoke)

    def until_in_flight(self, count: int) -> None:
        """Of the slow model."""
        self._do(lambda: until(lambda: self.stage.in_flight("beta") == count))

    def until_waiting(self, count: int) -> None:
        """For the slow model."""
        self._do(lambda: until(lambda: self.stage.waiting("beta") == count))

    def places(self, places: int, *, waiting: int) -> None:
        admission = self.stage.gateway.admission
        admission._max_in_flight, admission._max_waiting = places, waiting

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def _do(self, act: Callable[[], Awaitable[Any]]) -> Any:
        """In the gateway's own loop."""

        async def run() -> Any:
            return await act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)


async def _serve(ready: Future[StandinFront]) -> None:
    stop = asyncio.Event()
    keys = Keys()
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        file.write(keys.lines)
        file.flush()
        async with (
            stage(keys=lambda: load_keys(file.name)) as s,
            standin(s, "alpha", aliases=ALIASES["alpha"]) as alpha,
            standin(s, "beta", *SPEED, "--max-model-len", "65536") as beta,
        ):
            s.supervisor.say(Grant("alpha", "a1", uds=str(alpha)))
            engines = {"alpha": str(alpha), "beta": str(beta)}
            ready.set_result(StandinFront(s, keys, engines, stop))
            await stop.wait()


@contextmanager
def standin_front() -> Iterator[StandinFront]:
    ready: Future[StandinFront] = Future()
    ended = threading.Event()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(ready))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise
        finally:
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    front = ready.result(30)
    yield front
    front.end()
    assert ended.wait(30)
    thread.join(5)
