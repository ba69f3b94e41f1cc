"""Several gateway workers on the same listening sockets, forked by a parent that supervises them.

The parent has no event loop and touches no request. Each worker holds one end of a socket pair: its
notifications for systemd go through it, and its EOF means that the parent is gone. A worker that
dies, or whose loop stalls, is replaced; its clients' requests end with it.

A parent that systemd restarts ends at once, and its workers serve on, new connections too, until
the next parent's workers are up: that one sends them HAND_OVER, and they drain beside it. In a stop
that is no restart, workers of former parents end with those of this one.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from llmux.ports import Notifier

logger = logging.getLogger(__name__)

HANG_SECS: Final = 20.0  # a worker that sends no watchdog ping for this time is killed …
BEATS: Final = 20  # … of which it sends this many per HANG_SECS, a quarter while it is idle
START_SECS: Final = 60.0  # as HANG_SECS, before its first ping: it imports
HANG_LOOKS: Final = 5  # at each worker, per HANG_SECS
STOP_SECS: Final = 50.0  # longer than a worker's drain, shorter than TimeoutStopSec
BEAT_SECS: Final = 4.0  # how often the parent checks the workers and pings systemd's watchdog
STOP_BEAT_SECS: Final = 0.5  # … and in a stop, since the end of former workers is no signal here
FIRST_DELAY_SECS: Final = 0.1  # before a worker is replaced; doubles while workers die young
MAX_DELAY_SECS: Final = 5.0
YOUNG_SECS: Final = 2.0

HAND_OVER: Final = signal.SIGUSR2

READY: Final = b"R"
ALIVE: Final = b"W"


class WorkerNotifier:
    """A worker's Notifier: reports to the parent. ``life`` becomes readable when that is gone."""

    def __init__(self, life: socket.socket) -> None:
        self.life = life

    def ready(self) -> None:
        self._send(READY)

    def watchdog(self) -> None:
        self._send(ALIVE)

    def status(self, text: str) -> None:
        """Ignored: the parent's status covers all workers."""

    def reloading(self) -> None:
        """As ``status``."""

    def stopping(self) -> None:
        """As ``status``."""

    def _send(self, word: bytes) -> None:
        with suppress(OSError):
            self.life.send(word)


class Unit(Protocol):
    """What the parent asks of the unit that it runs in."""

    def is_replaced(self) -> bool: ...
    def others(self) -> list[int]: ...


Work = Callable[[WorkerNotifier], None]  # one worker from start to stop


@dataclass(slots=True)
class _Worker:
    number: int
    pid: int
    sock: socket.socket
    began: float
    heard: float
    patience: float = START_SECS  # of silence
    ready: bool = False


@dataclass(slots=True)
class Parent:
    """``work`` is one worker from start to stop: from its first call on it calls its notifier's
    ``watchdog`` several times per ``hang_secs``. ``run`` returns when a stop was requested and
    every worker has ended; at once when another parent follows."""

    count: int
    work: Work
    notifier: Notifier
    unit: Unit
    hang_secs: float = HANG_SECS
    outdated: Callable[[], bool] = lambda: False  # no worker can be started any more
    _workers: dict[int, _Worker] = field(default_factory=dict)  # by number
    _due: dict[int, float] = field(default_factory=dict)  # number → when to start it
    _delay: float = FIRST_DELAY_SECS
    _selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    _stop_by: float | None = None
    _handed_over: bool = False
    _reported_ready: bool = False

    def run(self) -> None:
        signals, wakeup = socket.socketpair()
        for sock in (signals, wakeup):
            sock.setblocking(False)
        signal.signal(HAND_OVER, signal.SIG_IGN)  # for a worker that has no handler yet
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        former = {number: signal.signal(number, lambda *_: None) for number in numbers}
        former_fd = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        self._selector.register(signals, selectors.EVENT_READ, None)
        try:
            now = time.monotonic()
            self._due = dict.fromkeys(range(1, self.count + 1), now)
            while not self._handed_over and (
                self._stop_by is None or self._workers or self._former()
            ):
                self._turn(signals)
        finally:
            signal.set_wakeup_fd(former_fd)
            for number, handler in former.items():
                signal.signal(number, handler)
            self._selector.close()
            for worker in self._workers.values():
                worker.sock.close()
            signals.close()
            wakeup.close()

    def _turn(self, signals: socket.socket) -> None:
        now = time.monotonic()
        for number in [number for number, at in self._due.items() if at <= now]:
            if self.outdated():
                logger.info("the package was replaced: the next gateway replaces this worker")
                self._handed_over = True
                return
            del self._due[number]
            self._start(number)
        beat = BEAT_SECS if self._stop_by is None else STOP_BEAT_SECS
        waits = [beat, self.hang_secs / HANG_LOOKS, *(at - now for at in self._due.values())]
        for key, _ in self._selector.select(max(0.0, min(waits))):
            if key.data is None:
                for number in signals.recv(4096):
                    self._signalled(number)
            else:
                self._heard(key.data)
        self._check(time.monotonic())
        self.notifier.watchdog()

    # ---- workers --------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._be_worker(theirs)
        theirs.close()
        ours.setblocking(False)
        now = time.monotonic()
        worker = _Worker(number, pid, ours, began=now, heard=now)
        self._workers[number] = worker
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _be_worker(self, life: socket.socket) -> None:
        """Never returns: a worker must not unwind the parent's stack."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it has yet to read what may be new
            for other in self._workers.values():
                other.sock.close()
            self._selector.close()
            life.setblocking(False)
            self.work(WorkerNotifier(life))
            status = 0
        except BaseException:  # must not unwind into the parent's code
            logger.exception("a gateway worker failed")
        finally:
            logging.shutdown()
            os._exit(status)

    def _heard(self, worker: _Worker) -> None:
        try:
            words = worker.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if not words:
            self._selector.unregister(worker.sock)  # it is exiting; SIGCHLD follows
            return
        worker.heard, worker.patience = time.monotonic(), self.hang_secs
        if READY in words and not worker.ready:
            worker.ready = True
            self._delay = FIRST_DELAY_SECS
            up = sum(one.ready for one in self._workers.values())
            self.notifier.status(f"{up} of {self.count} workers are up")
            if up == self.count and not self._reported_ready:
                self._reported_ready = True
                self.notifier.ready()
                _send(HAND_OVER, self._former())

    def _check(self, now: float) -> None:
        for worker in list(self._workers.values()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                self._ended(worker, status, now)
            elif now - worker.heard > worker.patience and self._stop_by is None:
                logger.error("gateway worker %d has stood still for %.0f s: killed",
                             worker.pid, now - worker.heard)  # fmt: skip
                os.kill(worker.pid, signal.SIGKILL)
                worker.heard = now
        if self._stop_by is not None and now > self._stop_by:
            self._signal_all(signal.SIGKILL)
            _send(signal.SIGKILL, self._former())

    def _ended(self, worker: _Worker, status: int, now: float) -> None:
        del self._workers[worker.number]
        with suppress(KeyError, ValueError):
            self._selector.unregister(worker.sock)
        worker.sock.close()
        if self._stop_by is not None:
            return
        if now - worker.began < YOUNG_SECS:
            self._delay = min(self._delay * 2, MAX_DELAY_SECS)
        code = os.waitstatus_to_exitcode(status)
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        logger.error("gateway worker %d ended (%s): replaced", worker.pid, how)
        self._due[worker.number] = now + self._delay

    # ---- signals --------------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) and self._stop_by is None:
            self.notifier.stopping()
            self._due.clear()
            if self.unit.is_replaced():
                logger.info("restart: %d workers serve on until the next gateway is up",
                            len(self._workers))  # fmt: skip
                self._handed_over = True
                return
            self._stop_by = time.monotonic() + STOP_SECS
            self._signal_all(signal.SIGTERM)
            _send(signal.SIGTERM, self._former())
        elif number == signal.SIGHUP:
            self._signal_all(signal.SIGHUP)

    def _signal_all(self, number: int) -> None:
        _send(number, [worker.pid for worker in self._workers.values()])

    def _former(self) -> list[int]:
        """Workers that former parents left."""
        own = {worker.pid for worker in self._workers.values()}
        return [pid for pid in self.unit.others() if pid not in own]


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
