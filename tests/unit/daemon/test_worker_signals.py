"""What a gateway's worker makes of each signal, and of the end of its parent."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from runtime_harness import in_virtual_time

from llmux.daemon.gateway_worker import _serve
from llmux.gateway.stopping import Handover
from llmux.gateway.workers import HAND_OVER, HANG_SECS

DRAIN_SECS, ORPHAN_SECS = 30.0, 100.0
STOPS = (signal.SIGTERM, signal.SIGINT)


class Worker:
    def __init__(self) -> None:
        self.signals: dict[int, Callable[[], None]] = {}
        self.timers: list[tuple[int, float]] = []
        self.up = asyncio.Event()
        self.life, self.parent = socket.socketpair()
        self.stop: asyncio.Event
        self.handover: Handover
        self.reload: list[Callable[[], None]]

    async def serving(self, *, stop: Any, handover: Any, reload: Any) -> None:
        self.stop, self.handover, self.reload = stop, handover, reload
        self.up.set()
        await stop.wait()

    def is_so(self) -> tuple[bool, bool, bool]:
        """Stopped, in a hurry, handed over."""
        handover = self.handover
        return self.stop.is_set(), handover.hurried.is_set(), handover.begun


@asynccontextmanager
async def worker() -> AsyncIterator[Worker]:
    made = Worker()
    with pytest.MonkeyPatch.context() as monkeypatch:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", made.signals.__setitem__)
        timers = made.timers  # the process's own has the test's time limit
        monkeypatch.setattr(signal, "setitimer", lambda *timer: timers.append(timer))
        running = asyncio.create_task(_serve(made.serving, made.life, DRAIN_SECS, ORPHAN_SECS))
        try:
            async with asyncio.timeout(30):
                await made.up.wait()
            yield made
        finally:
            if made.up.is_set():
                made.stop.set()
            await running
            loop.remove_reader(made.life)
            made.life.close()
            made.parent.close()


TIMER = (signal.ITIMER_REAL, DRAIN_SECS + HANG_SECS)


@pytest.mark.parametrize(
    ("signals", "so", "timers"),
    [
        ([], (False, False, False), []),
        *[([number], (True, True, False), []) for number in STOPS],
        ([HAND_OVER], (True, False, True), [TIMER]),
        ([HAND_OVER, HAND_OVER], (True, False, True), [TIMER]),
        *[([HAND_OVER, number], (True, True, True), [TIMER]) for number in STOPS],
        *[([number, HAND_OVER], (True, True, False), []) for number in STOPS],
    ],
)
@in_virtual_time
async def test_a_stop_hurries_and_a_hand_over_drains(
    signals: list[int], so: tuple[bool, bool, bool], timers: list[Any]
) -> None:
    async with worker() as w:
        assert w.handover.secs == DRAIN_SECS
        for number in signals:
            w.signals[number]()
        assert (w.is_so(), w.timers) == (so, timers)


@in_virtual_time
async def test_a_worker_whose_parent_is_gone_serves_on_for_a_while() -> None:
    async with worker() as w:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(10 * ORPHAN_SECS)
        assert w.is_so() == (False, False, False), "its parent lives"
        w.parent.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not loop.remove_reader(w.life), "an end is heard once"
        await asyncio.sleep(ORPHAN_SECS / 2)
        assert w.is_so() == (False, False, False), "the successor may come up"
        async with asyncio.timeout(10 * ORPHAN_SECS):
            await w.stop.wait()
        assert loop.time() - began >= 11 * ORPHAN_SECS
        assert (w.is_so(), w.timers) == ((True, False, True), [TIMER])


@in_virtual_time
async def test_a_hangup_reloads_each_part() -> None:
    async with worker() as w:
        reloaded: list[str] = []
        w.reload += [lambda: reloaded.append("keys"), lambda: reloaded.append("tls")]
        w.signals[signal.SIGHUP]()
        await asyncio.sleep(0)
        assert reloaded == ["keys", "tls"]
        assert w.is_so() == (False, False, False)
